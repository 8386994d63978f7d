#include "plan.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "plans/families.h"
#include "tuned.h"

namespace fused_cna {

namespace {

constexpr int64_t extent_limit = int_limit - 1024;  // loops step by whole tiles, so they pass the end by less than one

[[noreturn]] void refuse(const ConvProblem& problem, const std::string& reason) {
    throw std::runtime_error("fused_cna: no kernel can take this convolution: " + reason + " (" + to_string(problem) + ")");
}

// Kernels hold coordinates, channels and product numbers in 32 bits, and offsets in 64.
void check_extents(const ConvProblem& problem) {
    const std::pair<const char*, int64_t> extents[] = {
        {"the padded input height", problem.padded_h()},
        {"the padded input width", problem.padded_w()},
        {"the number of input channels", problem.c},
        {"the number of output channels", problem.k},
        {"the number of products per output", problem.gemm_k()},
        {"the stride", std::max(problem.stride_h, problem.stride_w)},
        {"the dilation", std::max(problem.dil_h, problem.dil_w)},
    };
    for (const auto& [name, extent] : extents) {
        if (extent > extent_limit) {
            refuse(problem, std::string(name) + " is " + std::to_string(extent) + ", at most " +
                                std::to_string(extent_limit) + " is allowed");
        }
    }
}

// Legal before illegal, then by estimate.
bool is_better(const Candidate& a, const Candidate& b) {
    if (a.illegal.empty() != b.illegal.empty()) return a.illegal.empty();
    return a.illegal.empty() && a.plan.estimate < b.plan.estimate;
}

std::vector<Candidate>::const_iterator find_exactly(const std::vector<Candidate>& all, const std::string& name) {
    return std::find_if(all.begin(), all.end(), [&](const Candidate& c) { return to_string(c.plan) == name; });
}

// It takes any problem, and is found by its name alone.
constexpr Plan cudnn_plan{.kernel = Kernel::cudnn, .blocks = 1};
bool is_cudnn(const std::string& name) { return name == kernel_name(Kernel::cudnn); }

struct ForcedPlan {
    std::atomic<bool> active = false;
    std::mutex mutex;
    std::string name;
} forced;

}  // namespace

std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit) {
    return std::string(text) + " " + std::to_string(given) + unit + ", at most " + std::to_string(limit) + unit;
}

std::string too_old(const DeviceInfo& device) {
    if (device.compute_major >= 8) return "";
    return "it needs compute capability 8.0, the device has " + std::to_string(device.compute_major) + "." +
           std::to_string(device.compute_minor);
}

std::string describe_copies(const Plan& plan) {
    std::string text;
    if (plan.convert_x) text += " after a copy of x";
    if (plan.convert_weight) text += " after a copy of the weight";
    return text;
}

std::string too_far(const ConvProblem& problem) {
    constexpr int64_t limit = 1ll << 30;
    const int64_t reach = std::max((2 * problem.p() - 1) * problem.stride_h + problem.dil_h * problem.r,
                                   (2 * problem.q() - 1) * problem.stride_w + problem.dil_w * problem.s);
    return reach > limit ? with_numbers("it counts to", reach, " rows or columns", limit) : "";
}

std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device) {
    check_extents(problem);
    std::vector<Candidate> all;
    add_grouped(problem, device, all);
    add_depthwise_toeplitz(problem, device, all);
    add_depthwise(problem, device, all);
    add_stem(problem, device, all);
    add_small_m(problem, device, all);
    add_implicit_gemm(problem, device, all);
    add_direct(problem, device, all);
    std::stable_sort(all.begin(), all.end(), is_better);
    if (!all.front().illegal.empty()) refuse(problem, all.back().illegal + "; split the batch");
    return all;
}

Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device) {
    return list_candidates(problem, device).front().plan;
}

Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device) {
    const std::vector<Candidate> all = list_candidates(problem, device);
    // direct never needs any, so there is always a match
    return std::find_if(all.begin(), all.end(), [](const Candidate& c) { return !c.plan.allocates(); })->plan;
}

Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    if (is_cudnn(name)) return cudnn_plan;
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto begins_so = [&](const Candidate& candidate) { return to_string(candidate.plan).starts_with(name + " "); };
    auto found = find_exactly(all, name);
    if (found == all.end()) found = std::find_if(all.begin(), all.end(), begins_so);
    if (found == all.end() || !found->illegal.empty()) {
        std::string message = "fused_cna: no plan \"" + name + "\" for " + to_string(problem);
        message += found == all.end() ? "; there are:" : ": " + found->illegal + "; legal are:";
        for (const Candidate& candidate : all) {
            if (candidate.illegal.empty()) message += " \"" + to_string(candidate.plan) + "\"";
        }
        throw std::runtime_error(message);
    }
    return found->plan;
}

Candidate find_exact_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    if (is_cudnn(name)) return {.plan = cudnn_plan, .illegal = ""};
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto found = find_exactly(all, name);
    return found != all.end() ? *found : Candidate{.plan = {}, .illegal = "there is no plan \"" + name + "\""};
}

std::string force_plan(const std::string& name) {
    const std::lock_guard lock(forced.mutex);
    forced.active = !name.empty();
    return std::exchange(forced.name, name);
}

bool is_plan_forced() { return forced.active; }

Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device) {
    if (forced.active) {
        const std::lock_guard lock(forced.mutex);
        // another thread may have ended it since
        if (!forced.name.empty()) return find_plan(problem, device, forced.name);
    }
    // A server of ever new image sizes starts over now and then, rather than remembering them all.
    constexpr size_t most_plans = 10'000;
    static std::map<std::pair<ConvProblem, DeviceInfo>, Plan> plans;
    static uint64_t plans_version = 0;  // of the tuned plans when these were chosen
    static std::shared_mutex mutex;
    const std::pair key(problem, device);
    const uint64_t version = tuned_plans_version();
    {
        const std::shared_lock lock(mutex);
        if (plans_version == version) {
            if (const auto found = plans.find(key); found != plans.end()) return found->second;
        }
    }
    const std::optional<Plan> tuned = find_tuned_plan(problem, device);
    const Plan plan = tuned ? *tuned : choose_plan(problem, device);
    const std::unique_lock lock(mutex);
    if (plans.size() >= most_plans || plans_version != version) plans.clear();
    plans_version = version;
    plans.emplace(key, plan);
    return plan;
}

std::string to_string(const Plan& plan) {
    const std::string name = std::string(kernel_name(plan.kernel)) + " " + std::to_string(plan.tile.m) + "x" +
                             std::to_string(plan.tile.n) + "x" + std::to_string(plan.tile.k);
    switch (plan.kernel) {
        case Kernel::direct: return name;
        case Kernel::implicit_gemm_sm80: return name + describe_implicit_gemm(plan);
        case Kernel::implicit_gemm_tf32x3: return name + describe_implicit_gemm(plan);
        case Kernel::implicit_gemm_fp32: return name + describe_implicit_gemm(plan);
        case Kernel::small_m: return name + describe_small_m(plan);
        case Kernel::depthwise_toeplitz: return name + describe_depthwise_toeplitz(plan);
        case Kernel::grouped: return name + describe_grouped(plan);
        case Kernel::depthwise: return name + describe_depthwise(plan);
        case Kernel::stem: return name + describe_stem(plan);
        case Kernel::cudnn: return kernel_name(plan.kernel);
    }
    return name;
}

std::string to_string(const ConvProblem& problem) {
    std::ostringstream text;
    text << dtype_name(problem.dtype) << " input [" << problem.n << ", " << problem.c << ", " << problem.h << ", "
         << problem.w << "], weight [" << problem.k << ", " << problem.c_per_group() << ", " << problem.r << ", "
         << problem.s << "], stride (" << problem.stride_h << ", " << problem.stride_w << "), padding (" << problem.pad_top
         << ", " << problem.pad_bottom << ", " << problem.pad_left << ", " << problem.pad_right << "), dilation ("
         << problem.dil_h << ", " << problem.dil_w << "), groups " << problem.groups;
    return text.str();
}

}  // namespace fused_cna
