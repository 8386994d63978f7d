#include "run.h"

#include <stdexcept>
#include <string>

namespace fused_cna {

namespace {

const char* launch_implicit_gemm_sm80(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_implicit_gemm_sm80_float32(args, plan, stream);
        case DType::float16: return launch_implicit_gemm_sm80_float16(args, plan, stream);
        case DType::bfloat16: return launch_implicit_gemm_sm80_bfloat16(args, plan, stream);
    }
    return "implicit_gemm_sm80 has no instantiation of this dtype";
}

}  // namespace

void run(const ConvArgs& args, const Plan& plan, Stream stream) {
    if (plan.blocks == 0) return;
    const char* error = nullptr;
    switch (plan.kernel) {
        case Kernel::direct: error = launch_direct(args, plan, stream); break;
        case Kernel::implicit_gemm_sm80: error = launch_implicit_gemm_sm80(args, plan, stream); break;
        case Kernel::implicit_gemm_tf32x3: error = launch_implicit_gemm_tf32x3(args, plan, stream); break;
        case Kernel::implicit_gemm_fp32: error = launch_implicit_gemm_fp32(args, plan, stream); break;
        case Kernel::small_m: error = launch_small_m(args, plan, stream); break;
        case Kernel::depthwise_toeplitz: error = launch_depthwise_toeplitz(args, plan, stream); break;
        case Kernel::grouped: error = launch_grouped(args, plan, stream); break;
        case Kernel::depthwise: error = launch_depthwise(args, plan, stream); break;
        case Kernel::stem: error = launch_stem(args, plan, stream); break;
        case Kernel::cudnn: error = "it is ATen's, which only the operator can call"; break;
    }
    if (error) {
        throw std::runtime_error("fused_cna: launching " + to_string(plan) + " failed: " + error + " (" +
                                 to_string(args.problem) + ")");
    }
}

}  // namespace fused_cna
