// The rows of the implicit GEMM: the output pixel of each row, and where it is stored.
#pragma once

#include <device/device.cuh>

#include "args.h"
#include "kernels/common/divisor.h"

namespace fused_cna {

// n is -1 where the row does not exist.
struct Pixel {
    int64_t n;
    int p, q;

    __device__ bool exists() const { return n >= 0; }
};

// The output's size in the rows' type: 32 bits where they fit, because a 64-bit division costs several times more.
template <class Index>
struct OutputSize {
    Index n, p, q;

    __device__ Pixel pixel_of_row(Index row) const {
        if (row >= n * p * q) return {-1, 0, 0};
        return {static_cast<int64_t>(row / q / p), static_cast<int>(row / q % p), static_cast<int>(row % q)};
    }
};

// The same for 32-bit row numbers, without a division; made on the host.
struct OutputRows {
    int count = 0;
    Divisor q, p;

    OutputRows() = default;
    OutputRows(int64_t n, int64_t of_p, int64_t of_q)
        : count(static_cast<int>(n * of_p * of_q)), q(static_cast<int>(of_q)), p(static_cast<int>(of_p)) {}

    __device__ Pixel pixel_of_row(int row) const {
        if (row >= count) return {-1, 0, 0};
        const int line = q.quotient(row);
        return {p.quotient(line), p.remainder(line), q.remainder(row)};
    }
};

// Offsets of a pixel's channel 0 in the output and in the residual, in elements. y is -1 where the pixel does not exist.
struct alignas(16) RowPlace {
    int64_t y;
    int64_t residual;

    __device__ bool exists() const { return y >= 0; }
};

__device__ __forceinline__ RowPlace place_of_pixel(const ConvArgs& args, const Pixel& pixel) {
    const auto offset = [&](const Strides& strides) {
        return pixel.n * strides.n + pixel.p * strides.h + pixel.q * strides.w;
    };
    if (!pixel.exists()) return {-1, -1};
    return {offset(args.y_strides), offset(args.residual_strides)};
}

}  // namespace fused_cna
