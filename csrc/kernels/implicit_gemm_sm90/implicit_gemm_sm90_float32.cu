// The Hopper kernel for float32 rounded to tf32.
#include "kernels/implicit_gemm_sm90/launch.cuh"

namespace fused_cna::implicit_gemm_sm90 {

const char* launch_float32(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<float>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm_sm90
