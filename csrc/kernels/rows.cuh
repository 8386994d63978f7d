// The rows of the implicit GEMM: which output pixel each one is, and where it is stored.
#pragma once

#include <cstdint>

#include <device/types.cuh>

#include "../conv_args.h"

namespace fused_cna::kernels {

// n is -1 where there is no such row.
struct Pixel {
    int64_t n;
    int p, q;

    __device__ bool exists() const { return n >= 0; }
};

// P and Q, in the type that rows are counted in: 32 bits where they fit, because a division costs several times more in 64.
template <class Index>
struct OutputSize {
    Index n, p, q;

    __device__ Pixel pixel_of_row(Index row) const {
        if (row >= n * p * q) return {-1, 0, 0};
        return {static_cast<int64_t>(row / q / p), static_cast<int>(row / q % p), static_cast<int>(row % q)};
    }
};

// Offsets of a pixel's channel 0 in the output and in the residual, in elements.
struct RowPlace {
    int64_t y;
    int64_t residual;
    bool exists;
};

__device__ __forceinline__ RowPlace place_of_pixel(const ConvArgs& args, const Pixel& pixel) {
    const auto offset = [&](const Strides& strides) {
        return pixel.n * strides.n + pixel.p * strides.h + pixel.q * strides.w;
    };
    return {offset(args.y_strides), offset(args.residual_strides), pixel.exists()};
}

}  // namespace fused_cna::kernels
