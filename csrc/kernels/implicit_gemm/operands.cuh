// The operands of the implicit GEMM: its traits, and a block's part of the problem.
#pragma once

#include <device/device.cuh>

#include "kernels/common/gather.cuh"
#include "kernels/common/tile_store.cuh"
#include "kernels/implicit_gemm/tile.h"

namespace fused_cna::implicit_gemm {

using gather::swizzle;

// Like gather::Args: made on the host once per launch.
struct Args : gather::Args {
    Divisor tiles_per_group, tiles_n, tiles_m;
    int steps_per_split;
};

// VectorBytes as in gather::Shape.
// Arithmetic says how a warp multiplies the contents of a stage. It has:
//   bytes_per_step               bytes of every row that one step takes
//   rows_per_slice               rows of a warp that the epilogue takes at a time
//   reads_ahead                  whether it has two buffers, or only buffer 0
//   Math<Traits>                 the accumulators of one thread, with
//     Math(stages)               `stages` is the memory of all stages
//     read(buffer, stage, k)     reads step k of a stage into a buffer
//     multiply(buffer)           adds the products of a buffer
//     end_chunk()                without a second buffer: called after every 64 products or fewer, and at the end
//     write(slice, rows, pitch)  writes the warp's slice-th rows to memory whose rows are `pitch` floats apart
//     repair(...)                corrects sums that the whole block wrote, where the arithmetic could not compute them
template <class T, Tile Of, int VectorBytes, class Arithmetic>
struct Traits : gather::Shape<T, Of.m, Of.n, Of.k_bytes, Of.threads(), VectorBytes> {
    using Value = T;
    using Math = typename Arithmetic::template Math<Traits>;
    static constexpr Tile tile = Of;
    static constexpr int m = tile.m, n = tile.n, row_bytes = tile.k_bytes, k = row_bytes / sizeof(T);
    static constexpr int steps_per_chunk = 64 / k;
    static constexpr int stages = tile.stages, warps_m = tile.warps_m, warps_n = tile.warps_n;
    static constexpr int threads = tile.threads();

    static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
    static constexpr int k_steps = row_bytes / Arithmetic::bytes_per_step;
    static constexpr bool reads_ahead = Arithmetic::reads_ahead;

    // The epilogue takes a few rows of every warp at a time.
    static constexpr int warp_slice_rows = Arithmetic::rows_per_slice, slices = warp_m / warp_slice_rows;
    static constexpr int slice_rows = warps_m * warp_slice_rows, slice_pitch = n + 8;
    using Output = TileStore<T, TileShape<slice_rows, n, slice_pitch, threads, slices, 2>>;

    static_assert(warp_m % warp_slice_rows == 0, "a warp's rows must be whole slices");
    static_assert(!reads_ahead || k_steps % 2 == 0, "the two buffers must meet the same steps in every stage");
    static_assert(n <= threads, "a thread folds one channel");
    static_assert(stages >= 2, "one stage is read while another is filled");
};

// Adds a chunk of float32 sums to the total and starts the next chunk. Arithmetic that sums on the CUDA cores takes 64
// products per chunk: one running sum over thousands of products has several times the error.
template <int Count>
__device__ __forceinline__ void add_chunk(float (&total)[Count], float (&chunk)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        total[i] += chunk[i];
        chunk[i] = 0;
    }
}

struct Block : gather::Block {
    int tile_n, split;

    // Column tiles vary fastest over the grid: blocks that share activations run together and find them in the L2.
    template <class Traits>
    static __device__ Block of(const Args& args) {
        const int block = static_cast<int>(device::block_x());
        const int tile = args.tiles_n.quotient(block), tile_n = args.tiles_n.remainder(block);
        const int first_column = args.tiles_per_group.remainder(tile_n) * Traits::n;
        const int remaining = args.k_per_group - first_column;
        return {{.first_row = args.tiles_m.remainder(tile) * Traits::m,
                 .group = args.tiles_per_group.quotient(tile_n),
                 .first_column = first_column,
                 .columns = remaining < Traits::n ? remaining : Traits::n},
                tile_n,
                args.tiles_m.quotient(tile)};
    }
};

template <class Traits, template <int> class Rows>
using OperandLoader = gather::OperandLoader<Traits, Rows>;

}  // namespace fused_cna::implicit_gemm
