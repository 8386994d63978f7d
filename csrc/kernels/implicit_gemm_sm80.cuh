// Dense and grouped convolution as an implicit GEMM on tensor cores: mma.sync with operands brought by cp.async through
// several stages of swizzled shared memory. float16, bfloat16, and float32 rounded to tf32; compute capability 8.0 and
// newer. Channels of x and of the weight must be dense (stride 1).
#pragma once

#include <cstdint>

#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "activation_rows.cuh"
#include "epilogue.cuh"

namespace fused_cna::kernels {

// Everything that is the same for all threads and dear to compute, made on the host once per launch.
struct ImplicitGemmArgs {
    ConvArgs conv;
    ActivationGeometry x;
    WalkSteps walk_steps[3];  // to the next channels, the next s, the next r
    int64_t weight_k_bytes;   // stride of the weight's output channels
    int c_per_group, k_per_group;
    int tiles_per_group, tiles_n, tiles_m;
    int channel_steps;  // main-loop steps per tap
    int steps;          // main-loop steps of the whole reduction
    int steps_per_split;
};

// AccessBytes: the widest access that channels and alignment allow, 16, 8 or 4.
template <class T, GemmTile Tile, int AccessBytes>
struct ImplicitGemmTraits {
    using Value = T;
    static constexpr GemmTile tile = Tile;
    static constexpr int m = tile.m, n = tile.n, row_bytes = tile.k_bytes, k = row_bytes / sizeof(T);
    static constexpr int stages = tile.stages, warps_m = tile.warps_m, warps_n = tile.warps_n;
    static constexpr int threads = tile.threads();
    static constexpr int access_bytes = AccessBytes;

    // A thread copies one 16-byte chunk of every row_pass-th row.
    static constexpr int chunks_per_row = row_bytes / 16, row_pass = threads / chunks_per_row;
    static constexpr int x_rows = m / row_pass, weight_rows = n / row_pass;
    static constexpr int values_per_chunk = 16 / sizeof(T), values_per_access = AccessBytes / sizeof(T);
    static constexpr int stage_bytes = (m + n) * row_bytes, weight_start = m * row_bytes;

    static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
    static constexpr int fragments_m = warp_m / 16, fragments_n = warp_n / 8;
    static constexpr int k_steps = row_bytes / 32;  // MMAs along one row

    // The epilogue takes 16 rows of every warp at a time.
    static constexpr int slice_rows = warps_m * 16, slice_pitch = n + 8;

    static_assert(row_bytes == 64 || row_bytes == 128, "the swizzle is made for rows of 64 or 128 bytes");
    static_assert(m % row_pass == 0 && n % row_pass == 0, "every pass of the copies must be whole");
    static_assert(row_pass % 8 == 0, "rows that one thread copies must share their swizzle");
    static_assert(warp_m % 16 == 0 && warp_n % 16 == 0, "a warp makes whole 16 x 16 fragments");
    static_assert(slice_rows * slice_pitch * 4 <= stages * stage_bytes, "a slice must fit the operands' memory");
    static_assert(stages >= 2, "one stage is read while another is filled");
};

template <class Traits>
struct ImplicitGemmShared {
    union {
        alignas(128) unsigned char stages[Traits::stages][Traits::stage_bytes];
        float accumulators[Traits::slice_rows * Traits::slice_pitch];
    };
    RowPlace places[Traits::m];  // in the order in which slices take the rows
    ChannelFold folds[Traits::n];
};

// Where a 16-byte chunk lies within its row: chunks of one column in eight neighbouring rows lie in distinct banks, so that
// both the copies and load_matrices are free of conflicts.
template <int RowBytes>
__device__ __forceinline__ int swizzle(int row, int chunk) {
    return chunk ^ (RowBytes == 128 ? row % 8 : row / 2 % 4);
}

struct GemmBlock {
    int first_row, tile_n, split;
    int group, first_column;  // first_column counts within the group
    int columns;              // how many of the tile's columns exist

    // Column tiles run fastest over the grid: blocks that share activations run together and find them in the L2.
    template <class Traits>
    static __device__ GemmBlock of(const ImplicitGemmArgs& args) {
        const int block = static_cast<int>(device::block_x());
        const int tile_n = block % args.tiles_n, tile_m = block / args.tiles_n % args.tiles_m;
        const int first_column = tile_n % args.tiles_per_group * Traits::n;
        const int remaining = args.k_per_group - first_column;
        return {.first_row = tile_m * Traits::m,
                .tile_n = tile_n,
                .split = block / args.tiles_n / args.tiles_m,
                .group = tile_n / args.tiles_per_group,
                .first_column = first_column,
                .columns = remaining < Traits::n ? remaining : Traits::n};
    }

    __device__ int first_channel(const ImplicitGemmArgs& args) const { return group * args.k_per_group + first_column; }
};

// Copies the operands of one main-loop step after another into shared memory.
template <class Traits, template <int> class Rows>
class OperandLoader {
    using T = typename Traits::Value;

   public:
    __device__ OperandLoader(const ImplicitGemmArgs& args, const GemmBlock& block, int first_step, uint32_t shared)
        : args_(args) {
        const int row = device::thread_x() / Traits::chunks_per_row, chunk = device::thread_x() % Traits::chunks_per_row;
        const int first_value = chunk * Traits::values_per_chunk;
        all_values_ = args.c_per_group - first_value;
        last_values_ = Traits::k - first_value;
        weight_columns_ = block.columns - row;
        destination_ = shared + row * Traits::row_bytes + swizzle<Traits::row_bytes>(row, chunk) * 16;
        rows_.start(args.x, block.first_row + row, Traits::row_pass);

        const int tap = first_step / args.channel_steps;
        const int r = tap / args.x.s, s = tap % args.x.s, c = first_step % args.channel_steps * Traits::k;
        const int64_t x_tap = r * args.x.dil_h * args.x.h_bytes + s * args.x.dil_w * args.x.w_bytes;
        const int64_t first_channel = static_cast<int64_t>(block.group) * args.c_per_group + c;
        const FilterStrides& filter = args.conv.weight_strides;
        const int64_t first_weight = (block.first_channel(args) + row) * filter.k + r * filter.r + s * filter.s + c;
        values_ = all_values_ - c;
        walk_ = {.r = r,
                 .s = s,
                 .x = static_cast<const char*>(args.conv.x) + x_tap + first_channel * sizeof(T) + chunk * 16,
                 .weight = static_cast<const char*>(args.conv.weight) + first_weight * sizeof(T) + chunk * 16};
        rows_.enter_tap(args.x, walk_);
    }

    // Starts the copies of the walk's step into a stage, and walks on.
    __device__ __forceinline__ void load(uint32_t stage) {
        const uint32_t destination = destination_ + stage;
#pragma unroll
        for (int i = 0; i < Traits::x_rows; ++i) {
            copy_chunk(destination + i * Traits::row_pass * Traits::row_bytes, rows_.source(i, walk_),
                       rows_.is_inside(i) ? values_ : 0);
        }
#pragma unroll
        for (int i = 0; i < Traits::weight_rows; ++i) {
            copy_chunk(destination + Traits::weight_start + i * Traits::row_pass * Traits::row_bytes,
                       walk_.weight + i * Traits::row_pass * args_.weight_k_bytes,
                       i * Traits::row_pass < weight_columns_ ? values_ : 0);
        }
        advance();
    }

   private:
    // Values beyond `values` are written as zeros.
    static __device__ __forceinline__ void copy_chunk(uint32_t destination, const char* source, int values) {
#pragma unroll
        for (int i = 0; i < 16 / Traits::access_bytes; ++i) {
            device::copy_async<Traits::access_bytes>(destination + i * Traits::access_bytes,
                                                     source + i * Traits::access_bytes,
                                                     i * Traits::values_per_access < values);
        }
    }

    __device__ __forceinline__ void advance() {
        const bool next_tap = values_ <= last_values_;
        const bool next_row = next_tap && walk_.s + 1 == args_.x.s;
        const WalkSteps& steps = args_.walk_steps[next_tap + next_row];
        walk_.x += steps.x;
        walk_.weight += steps.weight;
        values_ = next_tap ? all_values_ : values_ - Traits::k;
        walk_.s = next_row ? 0 : walk_.s + next_tap;
        walk_.r += next_row;
        rows_.advance(args_.x, walk_, next_tap, next_row);
    }

    const ImplicitGemmArgs& args_;
    uint32_t destination_;
    int values_;  // channels of the group from this thread's chunk on: in this step, at a tap's first one
    int all_values_;
    int last_values_;     // as many as this, or fewer, are left in a tap's last step
    int weight_columns_;  // columns from this thread's first weight row to the last that exists
    Walk walk_;
    Rows<Traits::x_rows> rows_;
};

// What one MMA step of a warp takes from shared memory.
template <class Traits>
struct Fragments {
    uint32_t x[Traits::fragments_m][4];
    uint32_t weight[Traits::fragments_n][2];
};

// The lane's addresses for load_matrices in stage 0. A later k step flips bits of the chunk number, which the swizzle leaves
// to an exclusive or; fragments further down share their swizzle, because it repeats every 8 rows.
template <class Traits>
class FragmentReader {
   public:
    __device__ explicit FragmentReader(uint32_t shared) {
        const int lane = device::lane();
        const int x_row = device::warp() / Traits::warps_n * Traits::warp_m + lane % 16;
        const int weight_row = device::warp() % Traits::warps_n * Traits::warp_n + lane % 8 + lane / 16 * 8;
        x_ = shared + x_row * Traits::row_bytes + swizzle<Traits::row_bytes>(x_row, lane / 16) * 16;
        weight_ = shared + Traits::weight_start + weight_row * Traits::row_bytes +
                  swizzle<Traits::row_bytes>(weight_row, lane / 8 % 2) * 16;
    }

    __device__ __forceinline__ void read(Fragments<Traits>& fragments, uint32_t stage, int k_step) const {
        const uint32_t x = (x_ + stage) ^ (k_step * 32);
        const uint32_t weight = (weight_ + stage) ^ (k_step * 32);
#pragma unroll
        for (int i = 0; i < Traits::fragments_m; ++i) {
            device::load_matrices(x + i * 16 * Traits::row_bytes, fragments.x[i]);
        }
#pragma unroll
        for (int j = 0; j < Traits::fragments_n; j += 2) {
            uint32_t words[4];
            device::load_matrices(weight + j * 8 * Traits::row_bytes, words);
            fragments.weight[j][0] = words[0];
            fragments.weight[j][1] = words[1];
            fragments.weight[j + 1][0] = words[2];
            fragments.weight[j + 1][1] = words[3];
        }
        if constexpr (sizeof(typename Traits::Value) == 4) round_all(fragments);
    }

   private:
    // The tensor cores would truncate, which biases every product the same way.
    static __device__ __forceinline__ void round_all(Fragments<Traits>& fragments) {
#pragma unroll
        for (auto& words : fragments.x) {
#pragma unroll
            for (uint32_t& word : words) word = device::round_to_tf32(word);
        }
#pragma unroll
        for (auto& words : fragments.weight) {
#pragma unroll
            for (uint32_t& word : words) word = device::round_to_tf32(word);
        }
    }

    uint32_t x_, weight_;
};

template <class Traits>
using Accumulators = float[Traits::fragments_m][Traits::fragments_n][4];

template <class Traits>
__device__ __forceinline__ void multiply(Accumulators<Traits>& total, const Fragments<Traits>& fragments) {
#pragma unroll
    for (int i = 0; i < Traits::fragments_m; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::fragments_n; ++j) {
            device::multiply_add<typename Traits::Value>(total[i][j], fragments.x[i], fragments.weight[j]);
        }
    }
}

// Row of the tile that is row `index` in the order of the slices: slice i holds the i-th 16 rows of every warp.
template <class Traits>
__device__ __forceinline__ int row_of_slice_order(int index) {
    const int slice = index / Traits::slice_rows, within = index % Traits::slice_rows;
    return within / 16 * Traits::warp_m + slice * 16 + within % 16;
}

// Writes a warp's i-th 16 rows to memory whose rows lie `pitch` floats apart; `rows` points at the warp's first row.
template <class Traits>
__device__ __forceinline__ void write_fragments(const float (&fragments)[Traits::fragments_n][4], float* rows,
                                                int64_t pitch) {
    const int row = device::lane() / 4, column = device::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < Traits::fragments_n; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* pair = rows + (row + half * 8) * pitch + j * 8 + column;
            device::store_pair(pair, fragments[j][half * 2], fragments[j][half * 2 + 1]);
        }
    }
}

template <class Traits>
__device__ void prepare_tables(const ImplicitGemmArgs& args, const GemmBlock& block, ImplicitGemmShared<Traits>& shared) {
    for (int i = device::thread_x(); i < Traits::m; i += Traits::threads) {
        const int row = block.first_row + row_of_slice_order<Traits>(i);
        shared.places[i] = place_of_pixel(args.conv, args.x.output.pixel_of_row(row));
    }
    for (int i = device::thread_x(); i < Traits::n; i += Traits::threads) {
        shared.folds[i] = i < block.columns
                              ? fold_channel<typename Traits::Value>(args.conv.epilogue, block.first_channel(args) + i)
                              : ChannelFold{};
    }
}

// The main loop. Each step reads one stage while the copies of the next ones are under way; within a step the fragments of
// one MMA step are read while those before it are multiplied.
template <class Traits, template <int> class Rows>
__device__ __forceinline__ void accumulate(const ImplicitGemmArgs& args, const GemmBlock& block, uint32_t shared,
                                           Accumulators<Traits>& total) {
    const int first_step = block.split * args.steps_per_split;
    const int remaining = args.steps - first_step;
    const int steps = remaining < args.steps_per_split ? remaining : args.steps_per_split;
    OperandLoader<Traits, Rows> loader(args, block, first_step, shared);
    const FragmentReader<Traits> reader(shared);

    // Groups are committed even when empty, so that the number under way is always the same.
#pragma unroll
    for (int stage = 0; stage < Traits::stages - 1; ++stage) {
        if (stage < steps) loader.load(stage * Traits::stage_bytes);
        device::commit_copies();
    }
    device::wait_copies<Traits::stages - 2>();
    device::sync_threads();

    Fragments<Traits> fragments[2];
    constexpr uint32_t end = Traits::stages * Traits::stage_bytes;
    uint32_t read_stage = 0, write_stage = end - Traits::stage_bytes;
    reader.read(fragments[0], read_stage, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int k = 0; k < Traits::k_steps; ++k) {
            if (k == Traits::k_steps - 1) {
                // The next stage has landed, and every warp has read the last of the stage that is written next.
                device::wait_copies<Traits::stages - 2>();
                device::sync_threads();
                read_stage = read_stage + Traits::stage_bytes == end ? 0 : read_stage + Traits::stage_bytes;
            }
            reader.read(fragments[(k + 1) % 2], read_stage, (k + 1) % Traits::k_steps);
            if (k == 0) {
                if (step + Traits::stages - 1 < steps) loader.load(write_stage);
                device::commit_copies();
                write_stage = write_stage + Traits::stage_bytes == end ? 0 : write_stage + Traits::stage_bytes;
            }
            multiply<Traits>(total, fragments[k % 2]);
        }
    }
    // The epilogue takes over the stages.
    device::wait_copies<0>();
    device::sync_threads();
}

// Finishes and stores the tile slice by slice: a rolled loop, so that the activations are instantiated once.
template <class Traits>
__device__ __forceinline__ void store_slices(const ImplicitGemmArgs& args, const GemmBlock& block,
                                             ImplicitGemmShared<Traits>& shared, const Accumulators<Traits>& total) {
    const int warp_m = device::warp() / Traits::warps_n, warp_n = device::warp() % Traits::warps_n;
    float* warp_rows = shared.accumulators + warp_m * 16 * Traits::slice_pitch + warp_n * Traits::warp_n;
#pragma unroll 1
    for (int slice = 0; slice < Traits::fragments_m; ++slice) {
#pragma unroll
        for (int i = 0; i < Traits::fragments_m; ++i) {
            if (i == slice) write_fragments<Traits>(total[i], warp_rows, Traits::slice_pitch);
        }
        device::sync_threads();
        store_tile<typename Traits::Value, Traits::slice_rows, Traits::n, Traits::slice_pitch, Traits::threads>(
            args.conv, shared.accumulators, shared.places + slice * Traits::slice_rows, shared.folds,
            {block.first_channel(args), block.columns});
        device::sync_threads();
    }
}

// Writes the tile's share of the sums to the workspace, [splits][tiles_m * m][tiles_n * n] float32, for split_k to add up.
template <class Traits>
__device__ __forceinline__ void store_partial_sums(const ImplicitGemmArgs& args, const GemmBlock& block,
                                                   const Accumulators<Traits>& total) {
    const int warp_m = device::warp() / Traits::warps_n, warp_n = device::warp() % Traits::warps_n;
    const int64_t pitch = static_cast<int64_t>(args.tiles_n) * Traits::n;
    const int64_t first_row = static_cast<int64_t>(block.split) * args.tiles_m * Traits::m + block.first_row;
    float* warp_rows = args.conv.workspace + (first_row + warp_m * Traits::warp_m) * pitch + block.tile_n * Traits::n +
                       warp_n * Traits::warp_n;
#pragma unroll
    for (int i = 0; i < Traits::fragments_m; ++i) write_fragments<Traits>(total[i], warp_rows + i * 16 * pitch, pitch);
}

template <class Traits, template <int> class Rows>
__global__ void __launch_bounds__(Traits::threads, Traits::tile.blocks_per_multiprocessor)
    implicit_gemm_sm80(const __grid_constant__ ImplicitGemmArgs args) {
    auto& shared = device::shared_storage<ImplicitGemmShared<Traits>>();
    const GemmBlock block = GemmBlock::of<Traits>(args);
    prepare_tables(args, block, shared);

    Accumulators<Traits> total = {};
    accumulate<Traits, Rows>(args, block, device::shared_address(shared.stages), total);

    if (args.steps_per_split < args.steps) {
        store_partial_sums<Traits>(args, block, total);
    } else {
        store_slices<Traits>(args, block, shared, total);
    }
}

}  // namespace fused_cna::kernels
