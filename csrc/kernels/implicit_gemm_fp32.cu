#include "gemm_cuda_cores.cuh"
#include "implicit_gemm_launch.cuh"

namespace fused_cna {

namespace gemm = kernels::implicit_gemm;

const char* launch_implicit_gemm_fp32(const ConvArgs& args, const Plan& plan, Stream stream) {
    return gemm::launch_implicit_gemm<float, gemm::CudaCores, implicit_gemm_fp32_tiles>(args, plan, stream);
}

}  // namespace fused_cna
