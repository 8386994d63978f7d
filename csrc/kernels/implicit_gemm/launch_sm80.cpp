// The launcher of implicit_gemm_sm80: by storage type.
#include "args.h"
#include "plan/plan.h"

namespace fused_cna::implicit_gemm {

// One file per dtype, because the tiles take most of the compile time.
using Launch = const char*(const ConvArgs& args, const Plan& plan, Stream stream);
Launch launch_sm80_float32, launch_sm80_float16, launch_sm80_bfloat16;

const char* launch_sm80(const ConvArgs& args, const Plan& plan, Stream stream) {
    constexpr Launch* by_dtype[] = {launch_sm80_float32, launch_sm80_float16, launch_sm80_bfloat16};
    return by_dtype[static_cast<int>(args.problem.dtype)](args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm
