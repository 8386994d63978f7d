// The implicit GEMM on tensor cores: float32 rounded to tf32.
#include "kernels/implicit_gemm/launch.cuh"
#include "kernels/implicit_gemm/tensor_cores.cuh"

namespace fused_cna::implicit_gemm {

const char* launch_sm80_float32(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<float, TensorCores, sm80_tiles>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm
