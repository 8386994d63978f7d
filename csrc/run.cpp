#include "run.h"

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

}  // namespace

void run(const ConvArgs& args, const Plan& plan, Stream stream) {
    if (plan.blocks == 0) return;
    const char* error = nullptr;
    switch (plan.kernel) {
        case Kernel::direct: error = launch_direct(args, plan, stream); break;
        case Kernel::implicit_gemm_sm80: error = launch_implicit_gemm(args, plan, stream); break;
        case Kernel::stem: error = launch_stem(args, plan, stream); break;
    }
    if (error) {
        throw std::runtime_error("fused_cna: launching " + to_string(plan) + " failed: " + error + " (" +
                                 to_string(args.problem) + ")");
    }
}

}  // namespace fused_cna
