// Host side of the gather: fills the kernel's arguments once per launch.
#pragma once

#include "kernels/common/gather.cuh"

namespace fused_cna::gather {

// A dimension of size 1 may have any stride. Masked-out copies step along it; they read nothing, but still need an aligned
// address.
inline ConvArgs without_idle_strides(ConvArgs conv) {
    const ConvProblem& problem = conv.problem;
    if (problem.n == 1) conv.x_strides.n = 0;
    if (problem.h == 1) conv.x_strides.h = 0;
    if (problem.w == 1) conv.x_strides.w = 0;
    if (problem.k == 1) conv.weight_strides.k = 0;
    if (problem.r == 1) conv.weight_strides.r = 0;
    if (problem.s == 1) conv.weight_strides.s = 0;
    return conv;
}

// x_pixel_step: elements from each pixel of x to the next, for PointwiseRows alone.
template <class Shape>
Args make_args(const ConvArgs& given, int64_t x_pixel_step) {
    constexpr int64_t bytes = sizeof(typename Shape::Value);
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    Args args{.conv = without_idle_strides(given)};
    const ConvArgs& conv = args.conv;
    const ConvProblem& problem = conv.problem;
    args.x = {.output = {problem.n, problem.p(), problem.q()},
              .h = as_int(problem.h),
              .w = as_int(problem.w),
              .stride_h = as_int(problem.stride_h),
              .stride_w = as_int(problem.stride_w),
              .pad_top = as_int(problem.pad_top),
              .pad_left = as_int(problem.pad_left),
              .dil_h = Divisor(problem.dil_h),
              .dil_w = Divisor(problem.dil_w),
              .r = as_int(problem.r),
              .s = Divisor(problem.s),
              .n_bytes = conv.x_strides.n * bytes,
              .h_bytes = conv.x_strides.h * bytes,
              .w_bytes = conv.x_strides.w * bytes,
              .pixel_bytes = x_pixel_step * bytes};
    args.c_per_group = as_int(problem.c_per_group());
    args.k_per_group = as_int(problem.k_per_group());
    args.channel_steps = Divisor(ceil_div(args.c_per_group, Shape::k));
    args.last_s = args.x.s.value - 1;
    args.steps = args.x.r * args.x.s.value * args.channel_steps.value;
    args.weight_k_bytes = conv.weight_strides.k * bytes;

    const int64_t last_c = (args.channel_steps.value - 1) * int64_t{Shape::row_bytes};
    const auto set_steps = [&](int64_t WalkSteps::* operand, int64_t r_bytes, int64_t s_bytes) {
        args.walk_steps[0].*operand = Shape::row_bytes;
        args.walk_steps[1].*operand = s_bytes - last_c;
        args.walk_steps[2].*operand = r_bytes - args.last_s * s_bytes - last_c;
    };
    set_steps(&WalkSteps::x, args.x.dil_h.value * args.x.h_bytes, args.x.dil_w.value * args.x.w_bytes);
    set_steps(&WalkSteps::weight, conv.weight_strides.r * bytes, conv.weight_strides.s * bytes);
    return args;
}

}  // namespace fused_cna::gather
