#include "layout.h"

#include <cstdint>

namespace fused_cna {

namespace {

// The widest access, in bytes up to 16, that an address and every distance between runs of channels allow.
class Access {
   public:
    void require(int64_t bytes) {
        while (bytes % widest_ != 0) widest_ /= 2;
    }
    // A dimension of size 1 is never stepped along, whatever its stride.
    void require_stride(int64_t bytes, int64_t size) {
        if (size > 1) require(bytes);
    }
    int64_t widest() const { return widest_; }

   private:
    int64_t widest_ = 16;
};

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

int64_t x_access(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const int64_t bytes = size_in_bytes(problem.dtype);
    if (problem.c > 1 && args.x_strides.c != 1) return 0;
    Access access;
    access.require(address(args.x));
    access.require(problem.c_per_group() * bytes);
    access.require_stride(args.x_strides.n * bytes, problem.n);
    access.require_stride(args.x_strides.h * bytes, problem.h);
    access.require_stride(args.x_strides.w * bytes, problem.w);
    return access.widest();
}

int64_t weight_access(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const int64_t bytes = size_in_bytes(problem.dtype);
    if (problem.c_per_group() > 1 && args.weight_strides.c != 1) return 0;
    Access access;
    access.require(address(args.weight));
    access.require(problem.c_per_group() * bytes);
    access.require_stride(args.weight_strides.k * bytes, problem.k);
    access.require_stride(args.weight_strides.r * bytes, problem.r);
    access.require_stride(args.weight_strides.s * bytes, problem.s);
    return access.widest();
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
    args.problem.x_access = x_access(args);
    args.problem.weight_access = weight_access(args);
    args.problem.x_pixels_even = pixel_step(args).has_value();
}

}  // namespace fused_cna
