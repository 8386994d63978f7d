// Host side of the implicit GEMM: from a plan to the instantiation that it names. Included once per dtype and arithmetic.
#pragma once

#include "kernels/common/dispatch.cuh"
#include "kernels/implicit_gemm/kernel.cuh"
#include "kernels/implicit_gemm/split_k.h"
#include "plan/layout.h"
#include "plan/plan.h"

namespace fused_cna::implicit_gemm {

// A dimension of size 1 may have any stride. Copies that are masked out do step along it, read nothing there, but need an
// aligned address all the same.
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

template <class Traits>
Args make_args(const ConvArgs& given, const Plan& plan) {
    using T = typename Traits::Value;
    constexpr int64_t bytes = sizeof(T);
    const auto as_int = [](int64_t value) { return static_cast<int>(value); };
    const auto as_divisor = [](int64_t value) { return Divisor(static_cast<int>(value)); };
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
              .dil_h = as_divisor(problem.dil_h),
              .dil_w = as_divisor(problem.dil_w),
              .r = as_int(problem.r),
              .s = as_divisor(problem.s),
              .n_bytes = conv.x_strides.n * bytes,
              .h_bytes = conv.x_strides.h * bytes,
              .w_bytes = conv.x_strides.w * bytes,
              .pixel_bytes = pixel_step(conv).value_or(0) * bytes};
    args.c_per_group = as_int(problem.c_per_group());
    args.k_per_group = as_int(problem.k_per_group());
    args.tiles_per_group = as_divisor(ceil_div(args.k_per_group, Traits::n));
    args.tiles_n = as_divisor(args.tiles_per_group.value * problem.groups);
    args.tiles_m = as_divisor(ceil_div(problem.gemm_m(), Traits::m));
    args.channel_steps = as_divisor(ceil_div(args.c_per_group, Traits::k));
    args.last_s = args.x.s.value - 1;
    args.steps = args.x.r * args.x.s.value * args.channel_steps.value;
    args.steps_per_split = as_int(ceil_div(args.steps, std::get<Choice>(plan.choice).split_k));
    args.weight_k_bytes = conv.weight_strides.k * bytes;

    const int64_t last_c = (args.channel_steps.value - 1) * int64_t{Traits::row_bytes};
    const auto set_steps = [&](int64_t WalkSteps::* operand, int64_t r_bytes, int64_t s_bytes) {
        args.walk_steps[0].*operand = Traits::row_bytes;
        args.walk_steps[1].*operand = s_bytes - last_c;
        args.walk_steps[2].*operand = r_bytes - args.last_s * s_bytes - last_c;
    };
    set_steps(&WalkSteps::x, args.x.dil_h.value * args.x.h_bytes, args.x.dil_w.value * args.x.w_bytes);
    set_steps(&WalkSteps::weight, conv.weight_strides.r * bytes, conv.weight_strides.s * bytes);
    return args;
}

template <class Traits, template <int> class Rows>
const char* launch_kernel(const ConvArgs& conv, const Plan& plan, Stream stream) {
    static_assert(sizeof(Shared<Traits>) <= Traits::tile.shared_bytes() + 128,
                  "the plan's shared memory must be the kernel's");
    const Args args = make_args<Traits>(conv, plan);
    const device::LaunchShape shape{plan.blocks, Traits::threads, sizeof(Shared<Traits>)};
    if (const char* error = device::launch<implicit_gemm<Traits, Rows>>(shape, stream, args)) return error;
    const int split_k = std::get<Choice>(plan.choice).split_k;
    if (split_k == 1) return nullptr;
    return launch_split_k(conv, split_k, int64_t{args.tiles_m.value} * Traits::m, int64_t{args.tiles_n.value} * Traits::n,
                          int64_t{args.tiles_per_group.value} * Traits::n, stream);
}

// The instantiations, which are those that supported_addressing in plan.cpp allows.
template <class T, class Arithmetic, Tile tile>
const char* launch_tile(const ConvArgs& conv, const Plan& plan, Stream stream) {
    const Addressing addressing = std::get<Choice>(plan.choice).addressing;
    using Wide = Traits<T, tile, 16, Arithmetic>;
    if (plan.vector_bytes == 16) {
        if (addressing == Addressing::pointwise) return launch_kernel<Wide, PointwiseRows>(conv, plan, stream);
        if (addressing == Addressing::masked) return launch_kernel<Wide, MaskedRows>(conv, plan, stream);
    }
    if constexpr (tile.takes_narrow_vectors) {
        using Half = Traits<T, tile, 8, Arithmetic>;
        using Quarter = Traits<T, tile, 4, Arithmetic>;
        const bool is_masked = addressing == Addressing::masked;
        if (is_masked && plan.vector_bytes == 8) return launch_kernel<Half, MaskedRows>(conv, plan, stream);
        if (is_masked && plan.vector_bytes == 4) return launch_kernel<Quarter, MaskedRows>(conv, plan, stream);
        if constexpr (tile.takes_any_filter) {
            // What allows wide loads allows narrow ones: one version serves all.
            if (addressing == Addressing::plain) return launch_kernel<Quarter, PlainRows>(conv, plan, stream);
        }
    }
    return no_instantiation;
}

// tiles: the array in tile.h that the plan's choice counts in.
template <class T, class Arithmetic, const auto& tiles>
const char* launch_tiles(const ConvArgs& conv, const Plan& plan, Stream stream) {
    return with_tile<tiles>(std::get<Choice>(plan.choice).tile,
                            [&]<Tile tile>() { return launch_tile<T, Arithmetic, tile>(conv, plan, stream); });
}

}  // namespace fused_cna::implicit_gemm
