// Any convolution: any stride, padding, dilation, groups and memory format, with 64-bit offsets. An implicit GEMM on the
// CUDA cores that recomputes every coordinate. The fallback for the fast kernels, and the reference they are tested against.
#pragma once

#include <cmath>

#include <device/device.cuh>

#include "kernels/common/start.cuh"
#include "kernels/common/tile_store.cuh"
#include "kernels/direct/tile.h"

namespace fused_cna::direct {

// A block computes tile.m pixels x tile.n channels of one group, tile.k products per step; a thread computes thread_m x
// thread_n of them.
template <BlockTile tile>
struct Traits {
    static constexpr int m = tile.m, n = tile.n, k = tile.k;
    static constexpr int thread_n = n >= 64 ? 4 : 1, threads_n = n / thread_n, threads_m = threads / threads_n;
    static constexpr int thread_m = m / threads_m;
    static_assert(m % threads_m == 0 && threads % threads_n == 0, "threads must tile the block's tile");
    static_assert(k <= 64, "more than 64 products in one running sum lose accuracy");
};

// Rows are one value longer than the tile, so that writes down a column hit different banks.
template <class T, class Traits>
struct Shared {
    using Output = TileStore<T, TileShape<Traits::m, Traits::n, Traits::n + 1, threads>>;
    struct Operands {
        float x[Traits::k][Traits::m + 1];
        float weight[Traits::k][Traits::n + 1];
    };
    struct Results {
        float accumulators[Traits::m][Traits::n + 1];
        typename Output::ResidualSlots residual;
    };
    union {
        Operands operands;
        Results results;
    };
    Pixel pixels[Traits::m];
    RowPlace places[Traits::m];
    ChannelFold folds[Traits::n];
    static_assert(sizeof(Operands) + sizeof(places) <= 32 * 1024, "direct must fit the 48 KB that need no opt-in");
};

// The block's place in the output, and the bounds of its loops.
struct Block {
    int64_t first_row;  // of gemm_m
    int group;
    int first_channel;      // within the group
    int channels_in_group;  // gemm_n
    int c_per_group;
    int products;  // gemm_k

    // Channel tiles vary fastest over the grid: blocks that share pixels run together and find them in the L2.
    template <class Traits>
    static __device__ Block of(const ConvProblem& problem) {
        const int k_per_group = static_cast<int>(problem.k_per_group());
        const int c_per_group = static_cast<int>(problem.c_per_group());
        const int tiles_per_group = static_cast<int>(ceil_div(k_per_group, Traits::n));
        const int64_t tiles_n = tiles_per_group * problem.groups;
        const int tile_n = static_cast<int>(device::block_x() % tiles_n);
        return {.first_row = device::block_x() / tiles_n * Traits::m,
                .group = tile_n / tiles_per_group,
                .first_channel = tile_n % tiles_per_group * Traits::n,
                .channels_in_group = k_per_group,
                .c_per_group = c_per_group,
                .products = static_cast<int>(problem.gemm_k())};
    }

    __device__ int64_t output_channel(int column) const {
        return static_cast<int64_t>(group) * channels_in_group + first_channel + column;
    }
};

template <class T, class Traits>
__device__ void prepare_pixels(const ConvArgs& args, const Block& block, Shared<T, Traits>& shared) {
    const OutputSize<int64_t> output{args.problem.n, args.problem.p(), args.problem.q()};
    for (int i = device::thread_x(); i < Traits::m; i += threads) {
        shared.pixels[i] = output.pixel_of_row(block.first_row + i);
        shared.places[i] = place_of_pixel(args, shared.pixels[i]);
    }
}

// Products are numbered channel first, then s, then r: neighbours in channels_last memory.
template <class T>
__device__ float load_activation(const ConvArgs& args, const Block& block, const Pixel& pixel, int product) {
    const ConvProblem& problem = args.problem;
    const int tap = product / block.c_per_group;
    const int s = static_cast<int>(problem.s);
    const int64_t c = static_cast<int64_t>(block.group) * block.c_per_group + product % block.c_per_group;
    const int64_t h = pixel.p * problem.stride_h - problem.pad_top + tap / s * problem.dil_h;
    const int64_t w = pixel.q * problem.stride_w - problem.pad_left + tap % s * problem.dil_w;
    if (!pixel.exists() || h < 0 || h >= problem.h || w < 0 || w >= problem.w) return 0.0f;
    const Strides& strides = args.x_strides;
    return device::to_float(
        static_cast<const T*>(args.x)[pixel.n * strides.n + c * strides.c + h * strides.h + w * strides.w]);
}

template <class T>
__device__ float load_weight(const ConvArgs& args, const Block& block, int column, int product) {
    if (block.first_channel + column >= block.channels_in_group) return 0.0f;
    const int tap = product / block.c_per_group;
    const int s = static_cast<int>(args.problem.s);
    const FilterStrides& strides = args.weight_strides;
    return device::to_float(static_cast<const T*>(
        args.weight)[block.output_channel(column) * strides.k + product % block.c_per_group * strides.c +
                     tap / s * strides.r + tap % s * strides.s]);
}

// Copies `depth` products of every row and column into shared memory.
template <class T, class Traits>
__device__ void load_operands(const ConvArgs& args, const Block& block, int first_product, int depth,
                              Shared<T, Traits>& shared) {
    // Neighbouring threads read along the dense dimension of x: channels, else pixels.
    const bool channels_dense = args.x_strides.c == 1;
    for (int i = device::thread_x(); i < Traits::m * Traits::k; i += threads) {
        const int product = channels_dense ? i % Traits::k : i / Traits::m;
        const int row = channels_dense ? i / Traits::k : i % Traits::m;
        if (product < depth) {
            shared.operands.x[product][row] = load_activation<T>(args, block, shared.pixels[row], first_product + product);
        }
    }
    for (int i = device::thread_x(); i < Traits::n * Traits::k; i += threads) {
        const int product = i % Traits::k, column = i / Traits::k;
        if (product < depth) {
            shared.operands.weight[product][column] = load_weight<T>(args, block, column, first_product + product);
        }
    }
}

// A thread's rows and columns are threads_m and threads_n apart, so that a warp reads neighbouring words.
template <class T, class Traits>
__device__ void multiply(const Shared<T, Traits>& shared, int depth, float (&total)[Traits::thread_m][Traits::thread_n]) {
    const int first_row = device::thread_x() / Traits::threads_n, first_column = device::thread_x() % Traits::threads_n;
    // Summed separately, then added to the total: one running sum over thousands of products has several times the error.
    float chunk[Traits::thread_m][Traits::thread_n] = {};
    for (int product = 0; product < depth; ++product) {
        float x[Traits::thread_m], weight[Traits::thread_n];
#pragma unroll
        for (int i = 0; i < Traits::thread_m; ++i) x[i] = shared.operands.x[product][first_row + i * Traits::threads_m];
#pragma unroll
        for (int j = 0; j < Traits::thread_n; ++j) {
            weight[j] = shared.operands.weight[product][first_column + j * Traits::threads_n];
        }
#pragma unroll
        for (int i = 0; i < Traits::thread_m; ++i) {
#pragma unroll
            for (int j = 0; j < Traits::thread_n; ++j) chunk[i][j] = fmaf(x[i], weight[j], chunk[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < Traits::thread_m; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::thread_n; ++j) total[i][j] += chunk[i][j];
    }
}

template <class T, class Traits>
__device__ void stage_accumulators(const float (&total)[Traits::thread_m][Traits::thread_n], Shared<T, Traits>& shared) {
    const int first_row = device::thread_x() / Traits::threads_n, first_column = device::thread_x() % Traits::threads_n;
#pragma unroll
    for (int i = 0; i < Traits::thread_m; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::thread_n; ++j) {
            shared.results.accumulators[first_row + i * Traits::threads_m][first_column + j * Traits::threads_n] =
                total[i][j];
        }
    }
}

template <class T, class Traits>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor) direct(const __grid_constant__ ConvArgs args) {
    auto& shared = device::shared_storage<Shared<T, Traits>>();
    static_assert(Traits::n <= threads, "a thread folds one channel");
    const Block block = Block::of<Traits>(args.problem);
    prepare_pixels<T>(args, block, shared);
    await_kernels_ahead(args, threads);
    const FoldTable<T> folds(args.epilogue, block.output_channel(0), Traits::n,
                             block.channels_in_group - block.first_channel);
    device::sync_threads();

    float total[Traits::thread_m][Traits::thread_n] = {};
    for (int first_product = 0; first_product < block.products; first_product += Traits::k) {
        const int remaining = block.products - first_product;
        const int depth = remaining < Traits::k ? remaining : Traits::k;
        load_operands<T>(args, block, first_product, depth, shared);
        device::sync_threads();
        multiply(shared, depth, total);
        device::sync_threads();
    }

    typename Shared<T, Traits>::Output output(args, shared.places, shared.folds,
                                              {block.output_channel(0), block.channels_in_group - block.first_channel},
                                              shared.results.residual);
    output.start();
    folds.store(shared.folds);
    stage_accumulators(total, shared);
    device::sync_threads();
    output.store(0, &shared.results.accumulators[0][0]);
}

}  // namespace fused_cna::direct
