// Copies the operands of an implicit GEMM by cp.async into swizzled stages of shared memory: any stride, dilation and
// filter; channels that allow loads of 4 bytes or more.
#pragma once

#include <device/device.cuh>

#include "kernels/common/gather_rows.cuh"

namespace fused_cna::gather {

// Values that are the same for all threads and expensive to compute; made on the host once per launch.
struct Args {
    ConvArgs conv;
    ActivationGeometry x;
    WalkSteps walk_steps[3];  // to the next channels, to the next s, to the next r
    int64_t weight_k_bytes;   // stride of the weight's output channels
    int c_per_group, k_per_group;
    Divisor channel_steps;  // main-loop steps per tap
    int last_s;             // the last s of a filter row
    int steps;              // main-loop steps of the whole reduction
};

// The rows and columns of a block's tile.
struct Block {
    int first_row;
    int group, first_column;  // first_column counts within the group
    int columns;              // how many of the tile's columns exist

    __device__ int first_channel(const Args& args) const { return group * args.k_per_group + first_column; }
};

// A stage holds M rows of x, then N rows of the weight. Each thread copies one 16-byte chunk of every row_pass-th row.
// VectorBytes: the widest load that channels and alignment allow: 16, 8 or 4.
template <class T, int M, int N, int RowBytes, int Threads, int VectorBytes>
struct Shape {
    using Value = T;
    static constexpr int m = M, n = N, row_bytes = RowBytes, k = row_bytes / sizeof(T), threads = Threads;
    static constexpr int vector_bytes = VectorBytes;
    static constexpr int chunks_per_row = row_bytes / 16, row_pass = threads / chunks_per_row;
    static constexpr int x_rows = m / row_pass, weight_rows = n / row_pass;
    static constexpr int values_per_chunk = 16 / sizeof(T), values_per_load = VectorBytes / sizeof(T);
    static constexpr int stage_bytes = (m + n) * row_bytes, weight_start = m * row_bytes;

    static_assert(row_bytes == 64 || row_bytes == 128, "the swizzle is made for rows of 64 or 128 bytes");
    static_assert(m % row_pass == 0 && n % row_pass == 0, "every pass of the copies must be whole");
    static_assert(row_pass % 8 == 0, "rows that one thread copies must share their swizzle");
};

// The position of a 16-byte chunk in its row. Chunks of one column in eight neighbouring rows are in distinct banks, so
// neither the copies nor load_matrices have bank conflicts.
template <int RowBytes>
__device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
    return chunk ^ (RowBytes == 128 ? row % 8 : row / 2 % 4);
}

// Copies the operands of successive main-loop steps into shared memory.
template <class Shape, template <int> class Rows>
class OperandLoader {
    using T = typename Shape::Value;

   public:
    __device__ OperandLoader(const Args& args, const Block& block, int first_step, uint32_t shared) : args_(args) {
        const int row = device::thread_x() / Shape::chunks_per_row, chunk = device::thread_x() % Shape::chunks_per_row;
        const int first_value = chunk * Shape::values_per_chunk;
        all_values_ = args.c_per_group - first_value;
        last_values_ = Shape::k - first_value;
        weight_columns_ = block.columns - row;
        destination_ = shared + row * Shape::row_bytes + swizzle<Shape::row_bytes>(row, chunk) * 16;
        rows_.start(args.x, block.first_row + row, Shape::row_pass);

        const int tap = args.channel_steps.quotient(first_step), c = args.channel_steps.remainder(first_step) * Shape::k;
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

    // Starts the copies of the current step into a stage, and advances to the next step.
    __device__ __forceinline__ void load(uint32_t stage) {
        load_x(stage);
        load_weight(stage);
        advance();
    }

    __device__ __forceinline__ void load_x(uint32_t stage) const {
#pragma unroll
        for (int i = 0; i < Shape::x_rows; ++i) {
            copy_chunk(destination(stage, i), rows_.source(i, walk_), rows_.is_inside(i) ? values_ : 0);
        }
    }

    __device__ __forceinline__ void load_weight(uint32_t stage) const {
#pragma unroll
        for (int i = 0; i < Shape::weight_rows; ++i) {
            copy_chunk(destination(stage, Shape::x_rows + i), walk_.weight + i * Shape::row_pass * args_.weight_k_bytes,
                       i * Shape::row_pass < weight_columns_ ? values_ : 0);
        }
    }

    __device__ __forceinline__ void advance() {
        const bool next_tap = values_ <= last_values_;
        const bool next_row = next_tap && walk_.s == args_.last_s;
        const WalkSteps& steps = args_.walk_steps[next_tap + next_row];
        walk_.x += steps.x;
        walk_.weight += steps.weight;
        values_ = next_tap ? all_values_ : values_ - Shape::k;
        walk_.s = next_row ? 0 : walk_.s + next_tap;
        walk_.r += next_row;
        rows_.advance(args_.x, walk_, next_tap, next_row);
    }

   private:
    // The address of this thread's chunk of its i-th row; rows of the weight follow those of x.
    __device__ __forceinline__ uint32_t destination(uint32_t stage, int i) const {
        return destination_ + stage + i * Shape::row_pass * Shape::row_bytes;
    }

    // Values from index `values` on are written as zeros.
    static __device__ __forceinline__ void copy_chunk(uint32_t destination, const char* source, int values) {
#pragma unroll
        for (int i = 0; i < 16 / Shape::vector_bytes; ++i) {
            device::copy_async<Shape::vector_bytes>(destination + i * Shape::vector_bytes, source + i * Shape::vector_bytes,
                                                    i * Shape::values_per_load < values);
        }
    }

    const Args& args_;
    uint32_t destination_;
    int values_;  // channels of the group from this thread's chunk on: in this step, and at a tap's first step
    int all_values_;
    int last_values_;     // the last step of a tap has at most this many left
    int weight_columns_;  // columns from this thread's first weight row to the last that exists
    Walk walk_;
    Rows<Shape::x_rows> rows_;
};

}  // namespace fused_cna::gather
