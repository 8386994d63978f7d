// The launcher of the Hopper kernel: by storage type.
#include "args.h"
#include "plan/plan.h"

namespace fused_cna::implicit_gemm_sm90 {

// One file per dtype, because the tiles take most of the compile time.
using Launch = const char*(const ConvArgs& args, const Plan& plan, Stream stream);
Launch launch_float32, launch_float16, launch_bfloat16;

const char* launch(const ConvArgs& args, const Plan& plan, Stream stream) {
    switch (args.problem.dtype) {
        case DType::float32: return launch_float32(args, plan, stream);
        case DType::float16: return launch_float16(args, plan, stream);
        case DType::bfloat16: return launch_bfloat16(args, plan, stream);
    }
    return "no storage type";
}

}  // namespace fused_cna::implicit_gemm_sm90
