#include "plan.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "plans/families.h"

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
    };
    for (const auto& [name, extent] : extents) {
        if (extent > extent_limit) {
            refuse(problem, std::string(name) + " is " + std::to_string(extent) + ", at most " +
                                std::to_string(extent_limit) + " is allowed");
        }
    }
}

// Legal before illegal, then by estimate; equal estimates keep the order in which they were listed: the most special kernel
// first, and its fastest rows.
bool is_better(const Candidate& a, const Candidate& b) {
    if (a.illegal.empty() != b.illegal.empty()) return a.illegal.empty();
    return a.illegal.empty() && a.plan.estimate.total_us() < b.plan.estimate.total_us();
}

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

std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device) {
    check_extents(problem);
    std::vector<Candidate> all;
    add_grouped(problem, device, all);
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
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto matches = [&](const Candidate& candidate) {
        const std::string full = to_string(candidate.plan);
        return full.starts_with(name) && (full.size() == name.size() || full[name.size()] == ' ');
    };
    const auto found = std::find_if(all.begin(), all.end(), matches);
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

void force_plan(const std::string& name) {
    const std::lock_guard lock(forced.mutex);
    forced.name = name;
    forced.active = !name.empty();
}

Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device) {
    if (forced.active) {
        const std::lock_guard lock(forced.mutex);
        return find_plan(problem, device, forced.name);
    }
    // A server of ever new image sizes starts over now and then, rather than remembering them all.
    constexpr size_t most_plans = 10'000;
    static std::map<std::pair<ConvProblem, DeviceInfo>, Plan> plans;
    static std::shared_mutex mutex;
    const std::pair key(problem, device);
    {
        const std::shared_lock lock(mutex);
        if (const auto found = plans.find(key); found != plans.end()) return found->second;
    }
    const Plan plan = choose_plan(problem, device);
    const std::unique_lock lock(mutex);
    if (plans.size() >= most_plans) plans.clear();
    plans.emplace(key, plan);
    return plan;
}

std::string to_string(const Plan& plan) {
    const std::string name = std::string(kernel_name(plan.kernel)) + " " + std::to_string(plan.tile.m) + "x" +
                             std::to_string(plan.tile.n) + "x" + std::to_string(plan.tile.k);
    switch (plan.kernel) {
        case Kernel::direct: return name;
        case Kernel::implicit_gemm_sm80: return name + describe_implicit_gemm(plan);
        case Kernel::grouped: return name + describe_grouped(plan);
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
