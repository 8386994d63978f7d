// The operands of the implicit GEMM: which part of the problem a block takes, and how cp.async brings it into the stages of
// shared memory, swizzled.
#pragma once

#include <device/device.cuh>

#include "kernels/common/tile_store.cuh"
#include "kernels/implicit_gemm/rows.cuh"
#include "kernels/implicit_gemm/tile.h"

namespace fused_cna::implicit_gemm {

// Everything that is the same for all threads and expensive to compute, made on the host once per launch.
struct Args {
    ConvArgs conv;
    ActivationGeometry x;
    WalkSteps walk_steps[3];  // to the next channels, the next s, the next r
    int64_t weight_k_bytes;   // stride of the weight's output channels
    int c_per_group, k_per_group;
    Divisor tiles_per_group, tiles_n, tiles_m;
    Divisor channel_steps;  // main-loop steps per tap
    int last_s;             // of a filter row
    int steps;              // main-loop steps of the whole reduction
    int steps_per_split;
};

// VectorBytes: the widest load that channels and alignment allow, 16, 8 or 4.
// Arithmetic says how a warp multiplies what lies in a stage, and names:
//   bytes_per_step               of every row, that one step of it takes
//   rows_per_slice               rows of a warp that the epilogue takes at a time
//   reads_ahead                  whether it has two buffers, or only buffer 0
//   Math<Traits>                 the accumulators of one thread, with
//     Math(stages)               reads from the memory of the stages
//     read(buffer, stage, k)     takes step k of a stage into a buffer
//     multiply(buffer)           adds the products of a buffer
//     end_chunk()                without a second buffer: is called once 64 products or fewer were added, and at the end
//     write(slice, rows, pitch)  writes the warp's slice-th rows to memory whose rows lie `pitch` floats apart
//     repair(...)                goes over sums that the whole block wrote, and mends what the arithmetic could not make
template <class T, Tile Of, int VectorBytes, class Arithmetic>
struct Traits {
    using Value = T;
    using Math = typename Arithmetic::template Math<Traits>;
    static constexpr Tile tile = Of;
    static constexpr int m = tile.m, n = tile.n, row_bytes = tile.k_bytes, k = row_bytes / sizeof(T);
    static constexpr int steps_per_chunk = 64 / k;
    static constexpr int stages = tile.stages, warps_m = tile.warps_m, warps_n = tile.warps_n;
    static constexpr int threads = tile.threads();
    static constexpr int vector_bytes = VectorBytes;

    // A thread copies one 16-byte chunk of every row_pass-th row.
    static constexpr int chunks_per_row = row_bytes / 16, row_pass = threads / chunks_per_row;
    static constexpr int x_rows = m / row_pass, weight_rows = n / row_pass;
    static constexpr int values_per_chunk = 16 / sizeof(T), values_per_load = VectorBytes / sizeof(T);
    static constexpr int stage_bytes = (m + n) * row_bytes, weight_start = m * row_bytes;

    static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
    static constexpr int k_steps = row_bytes / Arithmetic::bytes_per_step;
    static constexpr bool reads_ahead = Arithmetic::reads_ahead;

    // The epilogue takes a few rows of every warp at a time.
    static constexpr int warp_slice_rows = Arithmetic::rows_per_slice, slices = warp_m / warp_slice_rows;
    static constexpr int slice_rows = warps_m * warp_slice_rows, slice_pitch = n + 8;
    using Output = TileStore<T, TileShape<slice_rows, n, slice_pitch, threads, slices, 2>>;

    static_assert(row_bytes == 64 || row_bytes == 128, "the swizzle is made for rows of 64 or 128 bytes");
    static_assert(m % row_pass == 0 && n % row_pass == 0, "every pass of the copies must be whole");
    static_assert(row_pass % 8 == 0, "rows that one thread copies must share their swizzle");
    static_assert(warp_m % warp_slice_rows == 0, "a warp's rows must be whole slices");
    static_assert(!reads_ahead || k_steps % 2 == 0, "the two buffers must meet the same steps in every stage");
    static_assert(n <= threads, "a thread folds one channel");
    static_assert(stages >= 2, "one stage is read while another is filled");
};

// Adds a chunk of float32 sums to the total and starts the next. Arithmetics that sum on the CUDA cores take 64 products a
// chunk: one running sum over thousands of products has several times the error.
template <int Count>
__device__ __forceinline__ void add_chunk(float (&total)[Count], float (&chunk)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        total[i] += chunk[i];
        chunk[i] = 0;
    }
}

// Where a 16-byte chunk lies within its row: chunks of one column in eight neighbouring rows lie in distinct banks, so that
// both the copies and load_matrices are free of conflicts.
template <int RowBytes>
__device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
    return chunk ^ (RowBytes == 128 ? row % 8 : row / 2 % 4);
}

struct Block {
    int first_row, tile_n, split;
    int group, first_column;  // first_column counts within the group
    int columns;              // how many of the tile's columns exist

    // Column tiles run fastest over the grid: blocks that share activations run together and find them in the L2.
    template <class Traits>
    static __device__ Block of(const Args& args) {
        const int block = static_cast<int>(device::block_x());
        const int tile = args.tiles_n.quotient(block), tile_n = args.tiles_n.remainder(block);
        const int first_column = args.tiles_per_group.remainder(tile_n) * Traits::n;
        const int remaining = args.k_per_group - first_column;
        return {.first_row = args.tiles_m.remainder(tile) * Traits::m,
                .tile_n = tile_n,
                .split = args.tiles_m.quotient(tile),
                .group = args.tiles_per_group.quotient(tile_n),
                .first_column = first_column,
                .columns = remaining < Traits::n ? remaining : Traits::n};
    }

    __device__ int first_channel(const Args& args) const { return group * args.k_per_group + first_column; }
};

// Copies the operands of one main-loop step after another into shared memory.
template <class Traits, template <int> class Rows>
class OperandLoader {
    using T = typename Traits::Value;

   public:
    __device__ OperandLoader(const Args& args, const Block& block, int first_step, uint32_t shared) : args_(args) {
        const int row = device::thread_x() / Traits::chunks_per_row, chunk = device::thread_x() % Traits::chunks_per_row;
        const int first_value = chunk * Traits::values_per_chunk;
        all_values_ = args.c_per_group - first_value;
        last_values_ = Traits::k - first_value;
        weight_columns_ = block.columns - row;
        destination_ = shared + row * Traits::row_bytes + swizzle<Traits::row_bytes>(row, chunk) * 16;
        rows_.start(args.x, block.first_row + row, Traits::row_pass);

        const int tap = args.channel_steps.quotient(first_step), c = args.channel_steps.remainder(first_step) * Traits::k;
        const int r = args.x.s.quotient(tap), s = args.x.s.remainder(tap);
        const int64_t x_tap = r * args.x.dil_h.value * args.x.h_bytes + s * args.x.dil_w.value * args.x.w_bytes;
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
        for (int i = 0; i < 16 / Traits::vector_bytes; ++i) {
            device::copy_async<Traits::vector_bytes>(destination + i * Traits::vector_bytes,
                                                     source + i * Traits::vector_bytes,
                                                     i * Traits::values_per_load < values);
        }
    }

    __device__ __forceinline__ void advance() {
        const bool next_tap = values_ <= last_values_;
        const bool next_row = next_tap && walk_.s == args_.last_s;
        const WalkSteps& steps = args_.walk_steps[next_tap + next_row];
        walk_.x += steps.x;
        walk_.weight += steps.weight;
        values_ = next_tap ? all_values_ : values_ - Traits::k;
        walk_.s = next_row ? 0 : walk_.s + next_tap;
        walk_.r += next_row;
        rows_.advance(args_.x, walk_, next_tap, next_row);
    }

    const Args& args_;
    uint32_t destination_;
    int values_;  // channels of the group from this thread's chunk on: in this step, at a tap's first one
    int all_values_;
    int last_values_;     // as many as this, or fewer, are left in a tap's last step
    int weight_columns_;  // columns from this thread's first weight row to the last that exists
    Walk walk_;
    Rows<Traits::x_rows> rows_;
};

}  // namespace fused_cna::implicit_gemm
