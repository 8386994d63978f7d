#include "layout.h"

#include <cstdint>
#include <initializer_list>

namespace fused_cna {

namespace {

// A dimension that an access is repeated along; its stride is in elements.
struct Dimension {
    int64_t stride, size;
};

// The widest access, in bytes up to 16, that an address, the length of the runs and every distance between them allow.
int64_t widest_access(const void* pointer, int64_t run, std::initializer_list<Dimension> dimensions, DType dtype) {
    int64_t widest = 16;
    const auto require = [&](int64_t bytes) {
        while (bytes % widest != 0) widest /= 2;
    };
    require(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)));
    require(run * size_in_bytes(dtype));
    for (const Dimension& dimension : dimensions) {
        // A dimension of size 1 is never stepped along, whatever its stride.
        if (dimension.size > 1) require(dimension.stride * size_in_bytes(dtype));
    }
    return widest;
}

// x in runs of so many channels, which are dense or the access is 0.
int64_t x_access(const ConvArgs& args, int64_t run) {
    const ConvProblem& problem = args.problem;
    const Strides& strides = args.x_strides;
    if (problem.c > 1 && strides.c != 1) return 0;
    return widest_access(args.x, run, {{strides.n, problem.n}, {strides.h, problem.h}, {strides.w, problem.w}},
                         problem.dtype);
}

int64_t weight_access(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const FilterStrides& strides = args.weight_strides;
    if (problem.c_per_group() > 1 && strides.c != 1) return 0;
    return widest_access(args.weight, problem.c_per_group(),
                         {{strides.k, problem.k}, {strides.r, problem.r}, {strides.s, problem.s}}, problem.dtype);
}

}  // namespace

std::optional<int64_t> pixel_step(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const Strides& strides = args.x_strides;
    const int64_t step = problem.w > 1 ? strides.w : problem.h > 1 ? strides.h : strides.n;
    const bool rows_even = problem.h == 1 || strides.h == problem.w * step;
    const bool images_even = problem.n == 1 || strides.n == problem.h * problem.w * step;
    return rows_even && images_even ? std::optional(step) : std::nullopt;
}

void describe_layout(ConvArgs& args) {
    args.problem.x_access = x_access(args, args.problem.c_per_group());
    args.problem.x_pixel_access = x_access(args, args.problem.c);
    args.problem.weight_access = weight_access(args);
    args.problem.x_pixels_even = pixel_step(args).has_value();
}

}  // namespace fused_cna
