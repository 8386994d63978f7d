#include "plan/layout.h"

#include <initializer_list>

namespace fused_cna {

namespace {

// A dimension that loads step along; the stride is in elements.
struct Dimension {
    int64_t stride, size;
};

// The widest vector load, in bytes up to 16, that the address, the run's length and all strides allow.
int64_t widest_vector_bytes(const void* pointer, int64_t run, std::initializer_list<Dimension> dimensions, DType dtype) {
    int64_t widest = 16;
    const auto require = [&](int64_t bytes) {
        while (bytes % widest != 0) widest /= 2;
    };
    require(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)));
    require(run * size_in_bytes(dtype));
    for (const Dimension& dimension : dimensions) {
        // A dimension of size 1 is never stepped along, so its stride does not matter.
        if (dimension.size > 1) require(dimension.stride * size_in_bytes(dtype));
    }
    return widest;
}

// For x in runs of `run` channels; 0 where channels are not dense.
int64_t x_vector_bytes(const ConvArgs& args, int64_t run) {
    const ConvProblem& problem = args.problem;
    const Strides& strides = args.x_strides;
    if (problem.c > 1 && strides.c != 1) return 0;
    return widest_vector_bytes(args.x, run, {{strides.n, problem.n}, {strides.h, problem.h}, {strides.w, problem.w}},
                               problem.dtype);
}

int64_t weight_vector_bytes(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const FilterStrides& strides = args.weight_strides;
    if (problem.c_per_group() > 1 && strides.c != 1) return 0;
    return widest_vector_bytes(args.weight, problem.c_per_group(),
                               {{strides.k, problem.k}, {strides.r, problem.r}, {strides.s, problem.s}}, problem.dtype);
}

}  // namespace

std::optional<int64_t> pixel_step(int64_t n, int64_t h, int64_t w, const Strides& strides) {
    const int64_t step = w > 1 ? strides.w : h > 1 ? strides.h : strides.n;
    const bool rows_even = h == 1 || strides.h == w * step;
    const bool images_even = n == 1 || strides.n == h * w * step;
    return rows_even && images_even ? std::optional(step) : std::nullopt;
}

std::optional<int64_t> pixel_step(const ConvArgs& args) {
    return pixel_step(args.problem.n, args.problem.h, args.problem.w, args.x_strides);
}

Strides as_strides(const std::array<int64_t, 4>& strides) { return {strides[0], strides[1], strides[2], strides[3]}; }

FilterStrides as_filter_strides(const std::array<int64_t, 4>& strides) {
    return {strides[0], strides[1], strides[2], strides[3]};
}

ConvArgs make_args(const OperatorCall& call) {
    const auto& [n, c, h, w] = call.x.sizes;
    const auto& [filters, c_per_group, r, s] = call.weight.sizes;
    const auto& [top, bottom, left, right] = call.padding;
    ConvArgs args{.x = call.x.data,
                  .x_strides = as_strides(call.x.strides),
                  .weight = call.weight.data,
                  .weight_strides = as_filter_strides(call.weight.strides)};
    args.problem = {.n = n,
                    .c = c,
                    .h = h,
                    .w = w,
                    .k = c_per_group == 0 ? 0 : filters,  // like torch: without input channels there are no output channels
                    .r = r,
                    .s = s,
                    .stride_h = call.stride[0],
                    .stride_w = call.stride[1],
                    .pad_top = top,
                    .pad_bottom = bottom,
                    .pad_left = left,
                    .pad_right = right,
                    .dil_h = call.dilation[0],
                    .dil_w = call.dilation[1],
                    .groups = call.groups,
                    .dtype = call.dtype,
                    .allow_tf32 = call.allow_tf32 && call.dtype == DType::float32,
                    .has_norm = call.has_norm,
                    .has_residual = call.residual.has_value(),
                    .passes_after_cudnn = passes_after_cudnn(call.activation, call.residual)};
    args.problem.x_vector_bytes = x_vector_bytes(args, args.problem.c_per_group());
    args.problem.x_pixel_vector_bytes = x_vector_bytes(args, c);
    args.problem.weight_vector_bytes = weight_vector_bytes(args);
    args.problem.x_pixels_even = pixel_step(args).has_value();
    return args;
}

}  // namespace fused_cna
