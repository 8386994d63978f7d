// What a kernel gets, and the declaration of every launcher: where host code and kernels meet.
#pragma once

#include <cstdint>

#include "conv_problem.h"
#include "epilogue.h"
#include "plan.h"
#include "stream.h"

namespace fused_cna {

// Strides are in elements, in the order of torch's NCHW view whatever the memory format; any of them may be 0.
struct Strides {
    int64_t n = 0, c = 0, h = 0, w = 0;
};

struct FilterStrides {
    int64_t k = 0, c = 0, r = 0, s = 0;
};

// A plain record: passed to kernels by value.
struct ConvArgs {
    ConvProblem problem;
    const void* x = nullptr;  // [N, C, H, W]
    Strides x_strides;
    const void* weight = nullptr;  // [K, C / groups, R, S]
    FilterStrides weight_strides;
    const void* residual = nullptr;  // [N, K, P, Q], or null
    Strides residual_strides;
    void* y = nullptr;  // [N, K, P, Q]
    Strides y_strides;
    Epilogue epilogue;
    float* workspace = nullptr;  // the plan's workspace_bytes, uninitialised
};

// Each returns null, or the launch error in words.
const char* launch_direct(const ConvArgs& args, const Plan& plan, Stream stream);

}  // namespace fused_cna
