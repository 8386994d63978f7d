// Repairs sums that the compensated products got wrong because an operand is infinite, NaN, or too large to split: the sum
// is then not finite. It is computed again from the original operands, one product after another, which is slow and rare.
#pragma once

#include <cmath>

#include <device/device.cuh>

#include "kernels/implicit_gemm/operands.cuh"

namespace fused_cna::implicit_gemm {

// The sum of one output over the main-loop steps of the block's split.
template <class Traits>
__device__ float exact_sum(const Args& args, const Block& block, int row, int column) {
    using T = typename Traits::Value;
    const Strides& of_x = args.conv.x_strides;
    const FilterStrides& of_weight = args.conv.weight_strides;
    const Pixel pixel = args.x.output.pixel_of_row(block.first_row + row);
    const int first_h = pixel.p * args.x.stride_h - args.x.pad_top, first_w = pixel.q * args.x.stride_w - args.x.pad_left;
    const int first_step = block.split * args.steps_per_split, end_step = first_step + args.steps_per_split;
    float sum = 0;
    for (int step = first_step; step < end_step && step < args.steps; ++step) {
        const int tap = args.channel_steps.quotient(step), first_c = args.channel_steps.remainder(step) * Traits::k;
        const int r = args.x.s.quotient(tap), s = args.x.s.remainder(tap);
        const int h = first_h + r * args.x.dil_h.value, w = first_w + s * args.x.dil_w.value;
        const bool inside = h >= 0 && h < args.x.h && w >= 0 && w < args.x.w;
        const T* x = static_cast<const T*>(args.conv.x) + pixel.n * of_x.n + h * of_x.h + w * of_x.w +
                     static_cast<int64_t>(block.group) * args.c_per_group;
        const T* weight = static_cast<const T*>(args.conv.weight) + (block.first_channel(args) + column) * of_weight.k +
                          r * of_weight.r + s * of_weight.s;
        float chunk = 0;
        for (int c = first_c; c < first_c + Traits::k && c < args.c_per_group; ++c) {
            chunk = fmaf(inside ? device::to_float(x[c]) : 0.0f, device::to_float(weight[c]), chunk);
        }
        sum += chunk;
    }
    return sum;
}

// Checks rows of sums in memory that the whole block sees, `pitch` floats apart; row_of_tile(i) is the tile's row of the
// i-th. Rows and columns outside the output may also hold non-finite values, where a zero meets an infinity; these stay.
template <class Traits, class RowOfTile>
__device__ __forceinline__ void repair_sums(const Args& args, const Block& block, float* sums, int64_t pitch, int rows,
                                            const RowOfTile& row_of_tile) {
    const int rows_of_output = args.x.output.count - block.first_row;
#pragma unroll 1
    for (int i = device::thread_x(); i < rows * Traits::n; i += Traits::threads) {
        const int row = row_of_tile(i / Traits::n), column = i % Traits::n;
        float& sum = sums[i / Traits::n * pitch + column];
        const bool exists = row < rows_of_output && column < block.columns;
        if (exists && !(fabsf(sum) < INFINITY)) sum = exact_sum<Traits>(args, block, row, column);
    }
}

}  // namespace fused_cna::implicit_gemm
