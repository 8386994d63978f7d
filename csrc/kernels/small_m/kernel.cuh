// Convolutions with few output pixels: squeeze-excite, heads. Bound by one read of the weight, and for small weights by
// latency, so it uses neither tensor cores nor copies to shared memory: a team of lanes streams whole filters through
// registers, 16 bytes per lane and load, and sums in a fixed order. x is read through the L1, where it stays: staging it
// would cost a barrier per step and save no loads. float32 is exact.
#pragma once

#include <cstring>

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/common/start.cuh"
#include "kernels/small_m/tile.h"

namespace fused_cna::small_m {

// Made on the host once per launch.
struct Args {
    ConvArgs conv;
    OutputRows output;  // its count is gemm_m
    int c_per_group, k_per_group;
    Divisor lanes;    // per team
    int teams;        // per block
    Divisor columns;  // output channels per block
    Divisor tiles_m, tiles_n_per_group;
    Divisor chunks_per_tap, s;  // a chunk is 16 bytes
    int chunks, steps;          // over all taps
};

// VectorBytes: bytes per load; as narrow as one value, it allows channels at any stride. Pointwise: the filter has one tap,
// which is inside the image for every output pixel.
template <class T, Tile tile, int VectorBytes, bool Pointwise>
struct Traits {
    using Value = T;
    static constexpr int rows = tile.rows, channels = tile.channels, threads = tile.threads;
    static constexpr int unroll = tile.unroll_of(VectorBytes);
    static constexpr int vector_bytes = VectorBytes;
    static constexpr bool is_pointwise = Pointwise;
    static constexpr int values = device::values_per_vector<T>;  // per chunk
    static constexpr int most_columns = threads * channels;

    static_assert(unroll * values <= 64, "more than 64 products in one running sum lose accuracy");
    static_assert(channels * unroll * (16 / vector_bytes) >= 4,
                  "fewer loads under way leave the latency of device memory bare");
};

// Where an output pixel's window begins in x: its coordinates, which may be outside the image, and its offset in elements.
struct Window {
    int64_t offset;
    int h, w;
};

template <class Traits>
struct Shared {
    Window windows[Traits::rows];
    RowPlace places[Traits::rows];
    ChannelFold folds[Traits::most_columns];
    // [warps of a team][rows][columns]. Teams of several warps are fewer, so the size never exceeds this.
    float sums[Traits::rows * Traits::most_columns];
};

struct Block {
    int first_row, rows;       // how many of the tile's rows exist
    int group, first_channel;  // the channel's index within the group
    int columns;               // how many of the block's columns exist

    // Row tiles vary fastest over the grid: blocks that share filters run together and find them in the L2.
    template <class Traits>
    static __device__ Block of(const Args& args) {
        const int block = static_cast<int>(device::block_x());
        const int first_row = args.tiles_m.remainder(block) * Traits::rows, tile_n = args.tiles_m.quotient(block);
        const int first_channel = args.tiles_n_per_group.remainder(tile_n) * args.columns.value;
        return {.first_row = first_row,
                .rows = smaller(Traits::rows, args.output.count - first_row),
                .group = args.tiles_n_per_group.quotient(tile_n),
                .first_channel = first_channel,
                .columns = smaller(args.columns.value, args.k_per_group - first_channel)};
    }

    __device__ int64_t output_channel(const Args& args, int column) const {
        return static_cast<int64_t>(group) * args.k_per_group + first_channel + column;
    }

    static __device__ int smaller(int a, int b) { return a < b ? a : b; }
};

// A chunk's first `values` values, then zeros. `stride` is in elements and applies where values are loaded one by one.
template <class Traits>
__device__ __forceinline__ device::Vector16 load_chunk(const typename Traits::Value* source, int64_t stride, int values) {
    using T = typename Traits::Value;
    if constexpr (Traits::vector_bytes > sizeof(T)) return device::load_pieces<Traits::vector_bytes>(source, values);
    T parts[Traits::values] = {};
#pragma unroll
    for (int i = 0; i < Traits::values; ++i) {
        if (i < values) parts[i] = source[i * stride];
    }
    device::Vector16 chunk;
    memcpy(&chunk, parts, sizeof(chunk));
    return chunk;
}

// One lane's share of the reduction: one of every `lanes` neighbouring chunks, channel first, then s, then r.
template <class Traits>
class LaneOperands {
    using T = typename Traits::Value;

   public:
    __device__ LaneOperands(const Args& args, const Block& block) : args_(args) {
        // Neighbouring teams take neighbouring filters, which are adjacent in memory where they are short.
        const int team = args.lanes.quotient(device::thread_x());
        const ConvArgs& conv = args.conv;
        chunk_ = args.lanes.remainder(device::thread_x());
        columns_ = block.columns - team;
        rows_ = block.rows;
        weight_ = static_cast<const T*>(conv.weight) + block.output_channel(args, team) * conv.weight_strides.k;
        x_ = static_cast<const T*>(conv.x) + static_cast<int64_t>(block.group) * args.c_per_group * conv.x_strides.c;
    }

    // Starts the loads of a step's filters.
    __device__ __forceinline__ void load_weight(int step) {
        const FilterStrides& strides = args_.conv.weight_strides;
#pragma unroll
        for (int u = 0; u < Traits::unroll; ++u) {
            const Position at = position(step, u);
            const T* source = weight_ + at.c * strides.c + at.r * strides.r + at.s * strides.s;
#pragma unroll
            for (int j = 0; j < Traits::channels; ++j) {
                const int column = j * args_.teams;
                weights[u][j] =
                    load_chunk<Traits>(source + column * strides.k, strides.c, column < columns_ ? at.values : 0);
            }
        }
    }

    // Starts the loads of the same step's activations, zero outside the image.
    __device__ __forceinline__ void load_x(int step, const Window* windows) {
        const ConvProblem& problem = args_.conv.problem;
        const Strides& strides = args_.conv.x_strides;
#pragma unroll
        for (int u = 0; u < Traits::unroll; ++u) {
            const Position at = position(step, u);
            const int h = at.r * static_cast<int>(problem.dil_h), w = at.s * static_cast<int>(problem.dil_w);
            const T* source = x_ + at.c * strides.c + h * strides.h + w * strides.w;
#pragma unroll
            for (int i = 0; i < Traits::rows; ++i) {
                const Window& window = windows[i];
                bool exists = i < rows_;
                if constexpr (!Traits::is_pointwise) {
                    exists = exists && window.h + h >= 0 && window.h + h < problem.h && window.w + w >= 0 &&
                             window.w + w < problem.w;
                }
                x[u][i] = load_chunk<Traits>(source + (exists ? window.offset : 0), strides.c, exists ? at.values : 0);
            }
        }
    }

    // Whether any lane of the team has a u-th chunk in this step.
    __device__ bool has_chunks(int step, int u) const {
        return (step * Traits::unroll + u) * args_.lanes.value < args_.chunks;
    }

    device::Vector16 weights[Traits::unroll][Traits::channels];
    device::Vector16 x[Traits::unroll][Traits::rows];

   private:
    // A chunk's position in the filter; it has no values beyond the end of the reduction.
    struct Position {
        int r, s, c;
        int values;
    };

    __device__ __forceinline__ Position position(int step, int u) const {
        const int chunk = (step * Traits::unroll + u) * args_.lanes.value + chunk_;
        Position at{0, 0, chunk * Traits::values, 0};
        if constexpr (!Traits::is_pointwise) {
            const int tap = args_.chunks_per_tap.quotient(chunk);
            at = {args_.s.quotient(tap), args_.s.remainder(tap), args_.chunks_per_tap.remainder(chunk) * Traits::values, 0};
        }
        if (chunk < args_.chunks) at.values = Block::smaller(Traits::values, args_.c_per_group - at.c);
        return at;
    }

    const Args& args_;
    const T* weight_;  // the filter of the team's first channel
    const T* x_;       // the group's first channel
    int chunk_;        // the lane's place in the team
    int columns_;      // from the team's first column to the block's last; the team's next is `teams` further
    int rows_;
};

template <class Traits>
using Sums = float[Traits::rows][Traits::channels];

template <class Traits>
__device__ __forceinline__ void multiply(const LaneOperands<Traits>& operands, int step, Sums<Traits>& total) {
    using T = typename Traits::Value;
    // Summed separately, then added to the total: one running sum over thousands of products has several times the error.
    Sums<Traits> sums = {};
#pragma unroll
    for (int u = 0; u < Traits::unroll; ++u) {
        if (!operands.has_chunks(step, u)) break;
        float weights[Traits::channels][Traits::values];
#pragma unroll
        for (int j = 0; j < Traits::channels; ++j) device::convert_vector<T>(operands.weights[u][j], weights[j]);
#pragma unroll
        for (int i = 0; i < Traits::rows; ++i) {
            float x[Traits::values];
            device::convert_vector<T>(operands.x[u][i], x);
#pragma unroll
            for (int j = 0; j < Traits::channels; ++j) {
#pragma unroll
                for (int v = 0; v < Traits::values; ++v) sums[i][j] = fmaf(x[v], weights[j][v], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < Traits::rows; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::channels; ++j) total[i][j] += sums[i][j];
    }
}

template <class Traits>
__device__ void prepare_rows(const Args& args, const Block& block, Shared<Traits>& shared) {
    const int i = device::thread_x();
    if (i >= Traits::rows) return;
    const ConvProblem& problem = args.conv.problem;
    const Strides& strides = args.conv.x_strides;
    const Pixel pixel = args.output.pixel_of_row(block.first_row + i);
    const int64_t h = pixel.p * problem.stride_h - problem.pad_top, w = pixel.q * problem.stride_w - problem.pad_left;
    shared.places[i] = place_of_pixel(args.conv, pixel);
    shared.windows[i] = {pixel.n * strides.n + h * strides.h + w * strides.w, static_cast<int>(h), static_cast<int>(w)};
}

// Folds of the columns after the first `threads`, which exist where teams have one or two lanes.
template <class Traits>
__device__ void prepare_other_folds(const Args& args, const Block& block, Shared<Traits>& shared) {
#pragma unroll 1
    for (int i = device::thread_x() + Traits::threads; i < block.columns; i += Traits::threads) {
        const ChannelVectors<typename Traits::Value> vectors(args.conv.epilogue, block.output_channel(args, i), true);
        shared.folds[i] = vectors.fold(args.conv.epilogue);
    }
}

// Sums over the lanes of a team within one warp, into shared memory.
template <class Traits>
__device__ __forceinline__ void reduce(const Args& args, Sums<Traits>& total, Shared<Traits>& shared) {
    const int lanes_in_warp = Block::smaller(args.lanes.value, 32);
#pragma unroll 1
    for (int mask = lanes_in_warp / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int i = 0; i < Traits::rows; ++i) {
#pragma unroll
            for (int j = 0; j < Traits::channels; ++j) total[i][j] += device::shuffle_xor(total[i][j], mask);
        }
    }
    if (device::lane() % lanes_in_warp != 0) return;
    const int team = args.lanes.quotient(device::thread_x()), warp_of_team = args.lanes.remainder(device::thread_x()) / 32;
    float* sums = shared.sums + warp_of_team * Traits::rows * args.columns.value + team;
#pragma unroll
    for (int i = 0; i < Traits::rows; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::channels; ++j) sums[i * args.columns.value + j * args.teams] = total[i][j];
    }
}

// Calls visit(index in sums, row, column) for a thread's outputs. A turn takes as many neighbouring channels of a row as a
// team has: most of its time is latency, which they share.
template <class Traits, class Visit>
__device__ __forceinline__ void for_own_outputs(const Args& args, const Block& block, const Visit& visit) {
#pragma unroll 1
    for (int i = device::thread_x() * Traits::channels; i < block.rows * args.columns.value;
         i += Traits::threads * Traits::channels) {
        const int row = args.columns.quotient(i), column = args.columns.remainder(i);
        if (column < block.columns) visit(i, row, column);
    }
}

// Prefetches the residual into the L2 while the main loop runs.
template <class Traits>
__device__ __forceinline__ void prefetch_residual(const Args& args, const Block& block, const Shared<Traits>& shared) {
    for_own_outputs<Traits>(args, block, [&](int, int row, int column) {
        prefetch_pixel_residual<typename Traits::Value>(args.conv, shared.places[row], block.output_channel(args, column));
    });
}

// Sums over the warps of a team, finishes and stores.
template <class Traits>
__device__ __forceinline__ void store_sums(const Args& args, const Block& block, const Shared<Traits>& shared) {
    constexpr int width = Traits::channels;
    for_own_outputs<Traits>(args, block, [&](int first, int row, int column) {
        float sums[width] = {};
        ChannelFold folds[width];
#pragma unroll
        for (int j = 0; j < width; ++j) folds[j] = shared.folds[column + j];
#pragma unroll 1
        for (int warp = 0; warp * 32 < args.lanes.value; ++warp) {
            const float* of_warp = shared.sums + warp * Traits::rows * args.columns.value + first;
#pragma unroll
            for (int j = 0; j < width; ++j) sums[j] += of_warp[j];
        }
        finish_channels<width, typename Traits::Value>(sums, folds, args.conv, shared.places[row],
                                                       block.output_channel(args, column),
                                                       Block::smaller(width, block.columns - column));
    });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Tile::blocks_per_multiprocessor)
    small_m(const __grid_constant__ Args args) {
    auto& shared = device::shared_storage<Shared<Traits>>();
    const Block block = Block::of<Traits>(args);

    // The first loads start before anything waits for memory or for another thread; in a small layer there are no others.
    LaneOperands<Traits> operands(args, block);
    if constexpr (prepares_ahead) prepare_rows(args, block, shared);
    await_kernels_ahead(args.conv, Traits::threads);
    const FoldTable<typename Traits::Value> folds(args.conv.epilogue, block.output_channel(args, 0), Traits::threads,
                                                  block.columns);
    operands.load_weight(0);
    if constexpr (!prepares_ahead) prepare_rows(args, block, shared);
    device::sync_threads();
    operands.load_x(0, shared.windows);
    if (args.conv.residual) prefetch_residual(args, block, shared);
    folds.store(shared.folds);

    Sums<Traits> total = {};
#pragma unroll 1
    for (int step = 0;;) {
        multiply(operands, step, total);
        if (++step == args.steps) break;
        operands.load_weight(step);
        operands.load_x(step, shared.windows);
    }

    prepare_other_folds(args, block, shared);
    reduce(args, total, shared);
    device::sync_threads();
    store_sums(args, block, shared);
}

}  // namespace fused_cna::small_m
