#include "implicit_gemm_sm80_launch.cuh"

namespace fused_cna {

const char* launch_implicit_gemm_float32(const ConvArgs& args, const Plan& plan, Stream stream) {
    return kernels::launch_implicit_gemm<float>(args, plan, stream);
}

}  // namespace fused_cna
