// Limits of bulk tensor copies, for the plan and the launcher.
#pragma once

#include "problem.h"

namespace fused_cna::implicit_gemm_sm90 {

// Corners of an im2col map: the position of the first output pixel's first tap from the image's first pixel, and of the last
// output pixel's first tap from the image's last.
struct Corners {
    int64_t lower_w, lower_h, upper_w, upper_h;
};

constexpr Corners corners_of(const ConvProblem& p) {
    return {-p.pad_left, -p.pad_top, (p.q() - 1) * p.stride_w - p.pad_left - (p.w - 1),
            (p.p() - 1) * p.stride_h - p.pad_top - (p.h - 1)};
}

// CUDA Driver API, cuTensorMapEncodeIm2col, for four dimensions; PTX ISA, "im2colOffsets".
inline constexpr int64_t least_corner = -128, most_corner = 127, most_step = 8, most_offset = 255;

}  // namespace fused_cna::implicit_gemm_sm90
