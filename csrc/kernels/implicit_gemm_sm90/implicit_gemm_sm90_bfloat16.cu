// The Hopper kernel for bfloat16.
#include "kernels/implicit_gemm_sm90/launch.cuh"

namespace fused_cna::implicit_gemm_sm90 {

const char* launch_bfloat16(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<device::bfloat16>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm_sm90
