// The implicit GEMM on tensor cores: bfloat16.
#include "kernels/implicit_gemm/launch.cuh"
#include "kernels/implicit_gemm/tensor_cores.cuh"

namespace fused_cna::implicit_gemm {

const char* launch_sm80_bfloat16(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<device::bfloat16, TensorCores, sm80_tiles>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm
