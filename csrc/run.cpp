#include "run.h"

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fused_cna {

namespace {

const char* launch_implicit_gemm(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_implicit_gemm_float32(args, plan, stream);
        case DType::float16: return launch_implicit_gemm_float16(args, plan, stream);
        case DType::bfloat16: return launch_implicit_gemm_bfloat16(args, plan, stream);
    }
    return "implicit_gemm_sm80 has no instantiation of this dtype";
}

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

// Whether the step from a pixel to the next is the same within a row, between rows and between images.
bool x_pixels_even(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const Strides& strides = args.x_strides;
    const bool rows_even = problem.h == 1 || strides.h == problem.w * strides.w;
    const bool images_even = problem.n == 1 || strides.n == problem.h * problem.w * strides.w;
    return problem.w > 1 && rows_even && images_even;
}

}  // namespace

void describe_layout(ConvArgs& args) {
    args.problem.x_access = x_access(args);
    args.problem.weight_access = weight_access(args);
    args.problem.x_pixels_even = x_pixels_even(args);
}

void run(const ConvArgs& args, const Plan& plan, Stream stream) {
    if (plan.blocks == 0) return;
    const char* error = nullptr;
    switch (plan.kernel) {
        case Kernel::direct: error = launch_direct(args, plan, stream); break;
        case Kernel::implicit_gemm_sm80: error = launch_implicit_gemm(args, plan, stream); break;
    }
    if (error) {
        throw std::runtime_error("fused_cna: launching " + to_string(plan) + " failed: " + error + " (" +
                                 to_string(args.problem) + ")");
    }
}

}  // namespace fused_cna
