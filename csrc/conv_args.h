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
    // [N, K, P, Q], or null. It may be y itself: an element is read by the thread that stores it, before it does.
    const void* residual = nullptr;
    Strides residual_strides;
    void* y = nullptr;  // [N, K, P, Q]; may lie between the elements of x, but shares none with it
    Strides y_strides;
    Epilogue epilogue;
    float* workspace = nullptr;  // the plan's workspace_bytes, uninitialised
};

// Each returns null, or the launch error in words.
const char* launch_direct(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_grouped(const ConvArgs& args, const Plan& plan, Stream stream);

// One per dtype and arithmetic, each in a file of its own, because their tiles make most of the compile time.
const char* launch_implicit_gemm_sm80_float32(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_implicit_gemm_sm80_float16(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_implicit_gemm_sm80_bfloat16(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_implicit_gemm_tf32x3(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_implicit_gemm_fp32(const ConvArgs& args, const Plan& plan, Stream stream);

const char* launch_depthwise(const ConvArgs& args, const Plan& plan, Stream stream);
const char* launch_small_m(const ConvArgs& args, const Plan& plan, Stream stream);
// float16 and bfloat16.
const char* launch_depthwise_toeplitz(const ConvArgs& args, const Plan& plan, Stream stream);

const char* launch_stem(const ConvArgs& args, const Plan& plan, Stream stream);

// Adds up the partial sums of a split in a fixed order, [split_k][rows][columns] float32 in args.workspace, then finishes
// and stores. `columns` counts the padded columns of all groups, `columns_per_group` those of one.
const char* launch_split_k(const ConvArgs& args, int split_k, int64_t rows, int64_t columns, int64_t columns_per_group,
                           Stream stream);

}  // namespace fused_cna
