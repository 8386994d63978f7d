#include "gemm_tensor_cores.cuh"
#include "implicit_gemm_launch.cuh"

namespace fused_cna {

namespace gemm = kernels::implicit_gemm;

const char* launch_implicit_gemm_tf32x3(const ConvArgs& args, const Plan& plan, Stream stream) {
    return gemm::launch_implicit_gemm<float, gemm::CompensatedTensorCores, implicit_gemm_tf32x3_tiles>(args, plan, stream);
}

}  // namespace fused_cna
