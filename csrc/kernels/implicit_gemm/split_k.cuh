// Adds up the partial sums of a split reduction, always in the same order, then finishes and stores.
#pragma once

#include <device/device.cuh>

#include "kernels/common/tile_store.cuh"

namespace fused_cna::implicit_gemm {

struct SplitKTile {
    static constexpr int rows = 32, columns = 32, pitch = columns + 8, width = 8;
    static constexpr int threads = rows * columns / width;  // a thread adds up 8 neighbouring columns of one row
};

struct SplitKArgs {
    ConvArgs conv;
    int split_k;
    int64_t rows, columns, columns_per_group;  // of the workspace, padded to whole tiles
    OutputRows output;
};

template <class T>
struct SplitKShared {
    using Output = TileStore<T, TileShape<SplitKTile::rows, SplitKTile::columns, SplitKTile::pitch, SplitKTile::threads>>;
    alignas(16) float sums[SplitKTile::rows * SplitKTile::pitch];
    RowPlace places[SplitKTile::rows];
    ChannelFold folds[SplitKTile::columns];
    typename Output::ResidualSlots residual;
};

template <class T>
__global__ void __launch_bounds__(SplitKTile::threads) split_k(const __grid_constant__ SplitKArgs args) {
    using Tile = SplitKTile;
    auto& shared = device::shared_storage<SplitKShared<T>>();
    const ConvProblem& problem = args.conv.problem;
    const int64_t tiles_n = args.columns / Tile::columns;
    const int first_row = static_cast<int>(device::block_x() / tiles_n) * Tile::rows;
    const int64_t first_column = device::block_x() % tiles_n * Tile::columns;
    const int64_t group = first_column / args.columns_per_group, column = first_column % args.columns_per_group;
    const ColumnRange columns{group * problem.k_per_group() + column, static_cast<int>(problem.k_per_group() - column)};

    const int thread = device::thread_x();
    // Like await_kernels_ahead, without the weight, which is not read here.
    device::await_prerequisites();
    device::launch_dependents();
    const FoldTable<T> folds(args.conv.epilogue, columns.first_channel, Tile::columns, columns.count);
    if (thread < Tile::rows) {
        shared.places[thread] = place_of_pixel(args.conv, args.output.pixel_of_row(first_row + thread));
    }
    device::sync_threads();
    typename SplitKShared<T>::Output output(args.conv, shared.places, shared.folds, columns, shared.residual);
    output.start();

    const int row = thread / (Tile::columns / Tile::width), offset = thread % (Tile::columns / Tile::width) * Tile::width;
    float sums[Tile::width] = {};
    // Unrolled, to have several loads in flight.
#pragma unroll 4
    for (int split = 0; split < args.split_k; ++split) {
        float values[Tile::width];
        device::load_vector(
            args.conv.workspace + (split * args.rows + first_row + row) * args.columns + first_column + offset, values);
#pragma unroll
        for (int i = 0; i < Tile::width; ++i) sums[i] += values[i];
    }
    device::store_vector(&shared.sums[row * Tile::pitch + offset], sums);
    folds.store(shared.folds);
    device::sync_threads();
    output.store(0, shared.sums);
}

}  // namespace fused_cna::implicit_gemm
