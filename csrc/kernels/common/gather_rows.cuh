// The rows of the left matrix that a thread loads: for each output pixel, the activations under one tap of the filter. Three
// ways to find them, from the most general to the fastest; all give the same bytes.
#pragma once

#include <device/device.cuh>

#include "kernels/common/output_pixel.cuh"

namespace fused_cna::gather {

// A position in the reduction, which runs over the channels of a tap first, then s, then r.
struct Walk {
    int r, s;            // the tap
    const char* x;       // address of this position for a row whose first tap has offset 0
    const char* weight;  // address of this position in the thread's first filter
};

// Bytes from one step of the walk to the next, in each operand; made on the host.
struct WalkSteps {
    int64_t x, weight;
};

// Each kind of rows has:
//   start(x, first_row, step)             gives the thread rows first_row, first_row + step, ... of the GEMM
//   enter_tap(x, walk)                    called at the first step
//   advance(x, walk, next_tap, next_row)  called after each step; next_tap: s or r has changed, next_row: r has changed
//   is_inside(i)                          whether the i-th row exists and its tap lies inside the image
//   source(i, walk)                       the walk's address in the i-th row; meaningful only where is_inside(i)
struct ActivationGeometry {
    OutputRows output;
    int h, w;
    int stride_h, stride_w, pad_top, pad_left;
    Divisor dil_h, dil_w;
    int r;
    Divisor s;
    int64_t n_bytes, h_bytes, w_bytes;  // strides
    int64_t pixel_bytes;                // from one pixel to the next, for PointwiseRows alone
};

// Recomputes every coordinate at every tap. Any filter size; the reference for the other two.
template <int Count>
class PlainRows {
   public:
    __device__ void start(const ActivationGeometry& x, int first_row, int step) {
#pragma unroll
        for (int i = 0; i < Count; ++i) pixels_[i] = x.output.pixel_of_row(first_row + i * step);
    }

    __device__ void enter_tap(const ActivationGeometry& x, const Walk& walk) {
        const int64_t r = int64_t{walk.r} * x.dil_h.value, s = int64_t{walk.s} * x.dil_w.value;
        const int64_t walked = r * x.h_bytes + s * x.w_bytes;
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const int64_t h = pixels_[i].p * x.stride_h - x.pad_top + r;
            const int64_t w = pixels_[i].q * x.stride_w - x.pad_left + s;
            inside_[i] = pixels_[i].exists() && h >= 0 && h < x.h && w >= 0 && w < x.w;
            offsets_[i] = pixels_[i].n * x.n_bytes + h * x.h_bytes + w * x.w_bytes - walked;
        }
    }

    __device__ void advance(const ActivationGeometry& x, const Walk& walk, bool next_tap, bool) {
        if (next_tap) enter_tap(x, walk);
    }

    __device__ bool is_inside(int i) const { return inside_[i]; }
    __device__ const char* source(int i, const Walk& walk) const { return walk.x + offsets_[i]; }

   private:
    Pixel pixels_[Count];
    int64_t offsets_[Count];
    bool inside_[Count];
};

// One offset per row, and one bit per filter row and per filter column that says whether it is inside the image, all
// computed once. Filters of at most 32 x 32.
template <int Count>
class MaskedRows {
   public:
    __device__ void start(const ActivationGeometry& x, int first_row, int step) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const Pixel pixel = x.output.pixel_of_row(first_row + i * step);
            const int h = pixel.p * x.stride_h - x.pad_top, w = pixel.q * x.stride_w - x.pad_left;
            offsets_[i] = pixel.n * x.n_bytes + h * x.h_bytes + w * x.w_bytes;
            r_inside_[i] = pixel.exists() ? taps_inside(x.r, h, x.dil_h, x.h) : 0;
            s_inside_[i] = taps_inside(x.s.value, w, x.dil_w, x.w);
        }
    }

    __device__ void enter_tap(const ActivationGeometry&, const Walk& walk) {
        r_bit_ = 1u << walk.r;
        s_bit_ = 1u << walk.s;
    }

    // After tap 31 no bit is left, so nothing is inside.
    __device__ void advance(const ActivationGeometry&, const Walk&, bool next_tap, bool next_row) {
        s_bit_ = next_row ? 1u : s_bit_ << next_tap;
        r_bit_ <<= next_row;
    }

    __device__ bool is_inside(int i) const { return (r_inside_[i] & r_bit_) != 0 && (s_inside_[i] & s_bit_) != 0; }
    __device__ const char* source(int i, const Walk& walk) const { return walk.x + offsets_[i]; }

   private:
    // Taps lie at first, first + dilation, ...; those inside the image are consecutive.
    static __device__ uint32_t taps_inside(int taps, int first, const Divisor& dilation, int size) {
        const auto taps_before = [&](int position) {
            return position > first ? dilation.quotient(position - first - 1) + 1 : 0;
        };
        const int end = taps_before(size);
        return bits_below(end < taps ? end : taps) & ~bits_below(taps_before(0));
    }

    static __device__ uint32_t bits_below(int end) { return end < 32 ? (1u << end) - 1 : ~0u; }

    int64_t offsets_[Count];
    uint32_t r_inside_[Count], s_inside_[Count];
    uint32_t r_bit_, s_bit_;
};

// 1x1, stride 1, no padding, pixels evenly spaced in memory: a plain GEMM whose rows need no coordinates.
template <int Count>
class PointwiseRows {
   public:
    __device__ void start(const ActivationGeometry& x, int first_row, int step) {
        remaining_ = x.output.count - first_row;
        step_ = step;
        first_ = first_row * x.pixel_bytes;
        step_bytes_ = step * x.pixel_bytes;
    }

    __device__ void enter_tap(const ActivationGeometry&, const Walk&) {}
    __device__ void advance(const ActivationGeometry&, const Walk&, bool, bool) {}

    __device__ bool is_inside(int i) const { return i * step_ < remaining_; }
    __device__ const char* source(int i, const Walk& walk) const { return walk.x + first_ + i * step_bytes_; }

   private:
    int64_t first_, step_bytes_;
    int remaining_, step_;
};

}  // namespace fused_cna::gather
