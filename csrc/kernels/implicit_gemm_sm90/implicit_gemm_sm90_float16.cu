// The Hopper kernel for float16.
#include "kernels/implicit_gemm_sm90/launch.cuh"

namespace fused_cna::implicit_gemm_sm90 {

const char* launch_float16(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<device::half>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm_sm90
