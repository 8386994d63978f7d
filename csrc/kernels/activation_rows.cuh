// How a thread finds the rows of the left matrix that it loads: the activations under one tap of the filter, per output
// pixel. Three ways, from the most general to the fastest; all give the same bytes.
#pragma once

#include <cstdint>

#include <device/types.cuh>

#include "../conv_args.h"
#include "rows.cuh"

namespace fused_cna::kernels {

// A position in the reduction, which is walked with the channels of a tap fastest, then s, then r. The same for all threads.
struct Walk {
    int c, r, s;  // first channel of this step within its group, and the tap
    int c_bytes;
    int64_t x;       // bytes from the first tap of a pixel to this position
    int64_t weight;  // bytes from the start of a filter to this position
};

// Bytes from one step of the walk to the next, made on the host.
struct WalkSteps {
    int64_t next_c, next_s, next_r;
};

// Each kind of rows offers:
//   start(i, x, row)    makes row `row` of the GEMM this thread's i-th row
//   enter_tap(x, walk)  is called at the first step and whenever r or s changes
//   is_inside(i)        whether the row exists and its tap lies inside the image
//   offset(i, walk)     bytes from x to the walk's position in row i; meaningful only where is_inside(i)
struct ActivationGeometry {
    OutputSize<int> output;
    int h, w;
    int stride_h, stride_w, pad_top, pad_left, dil_h, dil_w;
    int r, s;
    int64_t n_bytes, h_bytes, w_bytes;  // strides
};

// Recomputes every coordinate at every tap. Any filter size; the oracle for the other two.
template <int Count>
class PlainRows {
   public:
    __device__ void start(int i, const ActivationGeometry& x, int row) {
        const Pixel pixel = x.output.pixel_of_row(row);
        exists_[i] = pixel.exists();
        image_[i] = pixel.n * x.n_bytes;
        h_[i] = pixel.p * x.stride_h - x.pad_top;
        w_[i] = pixel.q * x.stride_w - x.pad_left;
    }

    __device__ void enter_tap(const ActivationGeometry& x, const Walk& walk) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const int h = h_[i] + walk.r * x.dil_h, w = w_[i] + walk.s * x.dil_w;
            inside_[i] = exists_[i] && h >= 0 && h < x.h && w >= 0 && w < x.w;
            tap_[i] = image_[i] + h * x.h_bytes + w * x.w_bytes;
        }
    }

    __device__ bool is_inside(int i) const { return inside_[i]; }

    __device__ int64_t offset(int i, const Walk& walk) const { return tap_[i] + walk.c_bytes; }

   private:
    int64_t image_[Count], tap_[Count];
    int h_[Count], w_[Count];
    bool exists_[Count], inside_[Count];
};

// One offset per row, made once; a step adds the walk's. Whether a tap is inside is one bit per filter row and one per
// filter column, made once: filters of at most 32 x 32.
template <int Count>
class MaskedRows {
   public:
    static constexpr int max_filter = 32;

    __device__ void start(int i, const ActivationGeometry& x, int row) {
        const Pixel pixel = x.output.pixel_of_row(row);
        const int h = pixel.p * x.stride_h - x.pad_top, w = pixel.q * x.stride_w - x.pad_left;
        first_tap_[i] = pixel.n * x.n_bytes + h * x.h_bytes + w * x.w_bytes;
        r_inside_[i] = pixel.exists() ? taps_inside(x.r, h, x.dil_h, x.h) : 0;
        s_inside_[i] = taps_inside(x.s, w, x.dil_w, x.w);
    }

    __device__ void enter_tap(const ActivationGeometry&, const Walk& walk) {
        inside_ = 0;
#pragma unroll
        for (int i = 0; i < Count; ++i) inside_ |= (r_inside_[i] >> walk.r & s_inside_[i] >> walk.s & 1u) << i;
    }

    __device__ bool is_inside(int i) const { return inside_ >> i & 1u; }

    __device__ int64_t offset(int i, const Walk& walk) const { return first_tap_[i] + walk.x; }

   private:
    static __device__ uint32_t taps_inside(int taps, int first, int dilation, int size) {
        uint32_t mask = 0;
        for (int tap = 0; tap < taps; ++tap) {
            const int position = first + tap * dilation;
            mask |= static_cast<uint32_t>(position >= 0 && position < size) << tap;
        }
        return mask;
    }

    int64_t first_tap_[Count];
    uint32_t r_inside_[Count], s_inside_[Count];
    uint32_t inside_;
};

// 1x1, stride 1, no padding, pixels evenly spaced in memory: a plain GEMM, whose rows need no coordinates.
template <int Count>
class PointwiseRows {
   public:
    __device__ void start(int i, const ActivationGeometry& x, int row) {
        const bool exists = row < x.output.n * x.output.p * x.output.q;
        exists_ = (i == 0 ? 0u : exists_) | static_cast<uint32_t>(exists) << i;
        first_[i] = row * x.w_bytes;
    }

    __device__ void enter_tap(const ActivationGeometry&, const Walk&) {}

    __device__ bool is_inside(int i) const { return exists_ >> i & 1u; }

    __device__ int64_t offset(int i, const Walk& walk) const { return first_[i] + walk.x; }

   private:
    int64_t first_[Count];
    uint32_t exists_;
};

}  // namespace fused_cna::kernels
