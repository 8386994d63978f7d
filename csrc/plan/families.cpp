#include "plan/families.h"

#include <algorithm>

namespace fused_cna {

namespace depthwise { extern const Family family; }
namespace depthwise_toeplitz { extern const Family family; }
namespace direct { extern const Family family; }
namespace grouped { extern const Family family; }
namespace implicit_gemm { extern const Family sm80, tf32x3, fp32; }
namespace implicit_gemm_sm90 { extern const Family family; }
namespace small_m { extern const Family family; }
namespace stem { extern const Family family; }

std::span<const Family* const> families() {
    static constexpr const Family* all[] = {
        &grouped::family,     &depthwise_toeplitz::family,
        &depthwise::family,   &stem::family,
        &small_m::family,     &implicit_gemm_sm90::family,
        &implicit_gemm::sm80, &implicit_gemm::tf32x3,
        &implicit_gemm::fp32, &direct::family,
    };
    return all;
}

const Family& family_of(Kernel kernel) { return **std::ranges::find(families(), kernel, &Family::kernel); }

const char* kernel_name(Kernel kernel) { return kernel == Kernel::cudnn ? "cudnn" : family_of(kernel).name; }

std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit) {
    return std::string(text) + " " + std::to_string(given) + unit + ", at most " + std::to_string(limit) + unit;
}

std::string too_old(const DeviceInfo& device) {
    if (device.compute_major >= 8) return "";
    return "it needs compute capability 8.0, the device has " + std::to_string(device.compute_major) + "." +
           std::to_string(device.compute_minor);
}

std::string too_far(const ConvProblem& problem) {
    constexpr int64_t limit = 1ll << 30;
    const int64_t reach = std::max((2 * problem.p() - 1) * problem.stride_h + problem.dil_h * problem.r,
                                   (2 * problem.q() - 1) * problem.stride_w + problem.dil_w * problem.s);
    return reach > limit ? with_numbers("it counts to", reach, " rows or columns", limit) : "";
}

std::string no_copies_reason(const ConvProblem& problem) {
    if (problem.dense_vector_bytes() >= 4) return "";
    return "a group's " + std::to_string(problem.c_per_group()) +
           " channels allow loads of 2 bytes, cp.async copies at least 4";
}

void choose_access(const ConvProblem& problem, Plan& plan) {
    plan.convert_x = problem.x_vector_bytes < 4;
    plan.convert_weight = problem.weight_vector_bytes < 4;
    const int64_t dense = problem.dense_vector_bytes();
    plan.vector_bytes = static_cast<int>(std::min(plan.convert_x ? dense : problem.x_vector_bytes,
                                                  plan.convert_weight ? dense : problem.weight_vector_bytes));
}

bool is_pointwise(const ConvProblem& problem, const Plan& plan) {
    return problem.r == 1 && problem.s == 1 && problem.stride_h == 1 && problem.stride_w == 1 &&
           problem.padded_h() == problem.h && problem.padded_w() == problem.w && (problem.x_pixels_even || plan.convert_x);
}

bool fits_masks(const ConvProblem& problem) { return problem.r <= 32 && problem.s <= 32; }

std::string no_gather_reason(const ConvProblem& problem, int vector_bytes, bool takes_narrow_vectors,
                             bool takes_any_filter) {
    if (vector_bytes < 16 && !takes_narrow_vectors) {
        return "channels allow loads of " + std::to_string(vector_bytes) + " bytes, this tile takes 16";
    }
    if (!fits_masks(problem) && !takes_any_filter) {
        return "the filter is larger than 32x32, this tile has masked rows only";
    }
    return "";
}

std::string describe_copies(const Plan& plan) {
    std::string text;
    if (plan.convert_x) text += " after a copy of x";
    if (plan.convert_weight) text += " after a copy of the weight";
    return text;
}

}  // namespace fused_cna
