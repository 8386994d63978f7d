#include "gemm_tensor_cores.cuh"
#include "implicit_gemm_launch.cuh"

namespace fused_cna {

namespace gemm = kernels::implicit_gemm;

const char* launch_implicit_gemm_sm80_float16(const ConvArgs& args, const Plan& plan, Stream stream) {
    return gemm::launch_implicit_gemm<device::half, gemm::TensorCores, implicit_gemm_sm80_tiles>(args, plan, stream);
}

}  // namespace fused_cna
