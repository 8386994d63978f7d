// The implicit GEMM on the CUDA cores: exact float32.
#include "kernels/implicit_gemm/cuda_cores.cuh"
#include "kernels/implicit_gemm/launch.cuh"

namespace fused_cna::implicit_gemm {

const char* launch_fp32(const ConvArgs& args, const Plan& plan, Stream stream) {
    return launch_tiles<float, CudaCores, fp32_tiles>(args, plan, stream);
}

}  // namespace fused_cna::implicit_gemm
