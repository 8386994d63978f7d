// The implicit GEMM on tensor cores: float32 by three tf32 products.
#include "kernels/implicit_gemm/launch.cuh"
#include "kernels/implicit_gemm/tensor_cores.cuh"

namespace fused_cna::implicit_gemm {

const char* launch_tf32x3(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<float, CompensatedTensorCores, tf32x3_tiles>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm
