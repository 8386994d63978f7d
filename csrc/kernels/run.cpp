#include "kernels/run.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace fused_cna {

// Each returns null, or the launch error's message. Defined in the family's own folder.
using Launch = const char*(const ConvArgs& args, const Plan& plan, Stream stream);

namespace depthwise { Launch launch; }
namespace depthwise_toeplitz { Launch launch; }
namespace direct { Launch launch; }
namespace grouped { Launch launch; }
namespace implicit_gemm { Launch launch_sm80, launch_tf32x3, launch_fp32; }
namespace implicit_gemm_sm90 {
Launch launch;
bool has_tensor_maps();
RefusedMaps refused_maps();
}  // namespace implicit_gemm_sm90
namespace small_m { Launch launch; }
namespace stem { Launch launch; }

namespace {

struct Row {
    Kernel kernel;
    Launch* launch;
};

constexpr Row launchers[] = {
    {Kernel::depthwise, depthwise::launch},
    {Kernel::depthwise_toeplitz, depthwise_toeplitz::launch},
    {Kernel::direct, direct::launch},
    {Kernel::grouped, grouped::launch},
    {Kernel::implicit_gemm_fp32, implicit_gemm::launch_fp32},
    {Kernel::implicit_gemm_sm80, implicit_gemm::launch_sm80},
    {Kernel::implicit_gemm_tf32x3, implicit_gemm::launch_tf32x3},
    {Kernel::implicit_gemm_sm90, implicit_gemm_sm90::launch},
    {Kernel::small_m, small_m::launch},
    {Kernel::stem, stem::launch},
};

// The lines of a weight that is contiguous; 0 for any other.
uint32_t weight_lines(const ConvArgs& args) {
    const ConvProblem& problem = args.problem;
    const FilterStrides& strides = args.weight_strides;
    const int64_t values = problem.k * problem.gemm_k();
    const int64_t extent = 1 + (problem.k - 1) * strides.k + (problem.c_per_group() - 1) * strides.c +
                           (problem.r - 1) * strides.r + (problem.s - 1) * strides.s;
    const int64_t lines = ceil_div(values * size_in_bytes(problem.dtype), l2_line_bytes);
    return extent == values && lines <= std::numeric_limits<uint32_t>::max() ? static_cast<uint32_t>(lines) : 0;
}

bool keeps_alignment(const Strides& strides, DType dtype) {
    return strides.c == 1 && (strides.n | strides.h | strides.w) * size_in_bytes(dtype) % 16 == 0;
}

}  // namespace

void run(ConvArgs args, const Plan& plan, Stream stream) {
    if (plan.blocks == 0) return;
    args.residual_keeps_alignment = args.residual && keeps_alignment(args.residual_strides, args.problem.dtype);
    if (stream.starts_early) args.weight_lines = weight_lines(args);
    const Row* row = std::ranges::find(launchers, plan.kernel, &Row::kernel);
    const bool is_ours = row != std::end(launchers);
    const char* error = is_ours ? row->launch(args, plan, stream) : "it is ATen's, which only the operator can call";
    if (error) {
        throw std::runtime_error("fused_cna: launching " + to_string(plan) + " failed: " + error + " (" +
                                 to_string(args.problem) + ")");
    }
}

bool has_tensor_maps() { return implicit_gemm_sm90::has_tensor_maps(); }
RefusedMaps refused_tensor_maps() { return implicit_gemm_sm90::refused_maps(); }

}  // namespace fused_cna
