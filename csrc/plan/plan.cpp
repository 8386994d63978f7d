#include "plan/plan.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "plan/families.h"
#include "plan/tuned.h"

namespace fused_cna {

namespace {

constexpr int64_t extent_limit = int_limit - 1024;  // loops step by whole tiles, and so pass the end by less than one

[[noreturn]] void refuse(const ConvProblem& problem, const std::string& reason) {
    throw std::runtime_error("fused_cna: no kernel can take this convolution: " + reason + " (" + to_string(problem) + ")");
}

// Kernels hold coordinates, channels and product numbers in 32 bits, offsets in 64.
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

// Supported ones first, then by estimate.
bool is_better(const Candidate& a, const Candidate& b) {
    if (a.is_supported() != b.is_supported()) return a.is_supported();
    return a.is_supported() && a.plan.estimate < b.plan.estimate;
}

std::vector<Candidate>::const_iterator find_exactly(const std::vector<Candidate>& all, const std::string& name) {
    return std::find_if(all.begin(), all.end(), [&](const Candidate& c) { return to_string(c.plan) == name; });
}

// cuDNN takes any problem, and is found only by name.
constexpr Plan cudnn_plan{.kernel = Kernel::cudnn, .blocks = 1};
bool is_cudnn(const std::string& name) { return name == "cudnn"; }

struct ForcedPlan {
    std::atomic<bool> active = false;
    std::mutex mutex;
    std::string name;
} forced;

}  // namespace

std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device) {
    check_extents(problem);
    std::vector<Candidate> all;
    for (const Family* family : families()) family->list_candidates(family->kernel, problem, device, all);
    std::stable_sort(all.begin(), all.end(), is_better);
    if (!all.front().is_supported()) refuse(problem, all.back().unsupported_reason + "; split the batch");
    return all;
}

Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device) {
    return list_candidates(problem, device).front().plan;
}

Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device) {
    const std::vector<Candidate> all = list_candidates(problem, device);
    // `direct` never needs memory, so there is always a match
    return std::find_if(all.begin(), all.end(), [](const Candidate& c) { return !c.plan.allocates(); })->plan;
}

Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    if (is_cudnn(name)) return cudnn_plan;
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto begins_so = [&](const Candidate& candidate) { return to_string(candidate.plan).starts_with(name + " "); };
    auto found = find_exactly(all, name);
    if (found == all.end()) found = std::find_if(all.begin(), all.end(), begins_so);
    if (found == all.end() || !found->is_supported()) {
        std::string message = "fused_cna: no plan \"" + name + "\" for " + to_string(problem);
        message += found == all.end() ? "; there are:" : ": " + found->unsupported_reason + "; legal are:";
        for (const Candidate& candidate : all) {
            if (candidate.is_supported()) message += " \"" + to_string(candidate.plan) + "\"";
        }
        throw std::runtime_error(message);
    }
    return found->plan;
}

Candidate find_exact_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    if (is_cudnn(name)) return {.plan = cudnn_plan, .unsupported_reason = ""};
    const std::vector<Candidate> all = list_candidates(problem, device);
    const auto found = find_exactly(all, name);
    return found != all.end() ? *found : Candidate{.plan = {}, .unsupported_reason = "there is no plan \"" + name + "\""};
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
    // A full table is cleared, so that a server whose image sizes keep changing does not fill memory.
    constexpr size_t most_plans = 10'000;
    static std::map<std::pair<ConvProblem, DeviceInfo>, Plan> plans;
    static uint64_t plans_version = 0;  // tuned_plans_version() when these were chosen
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
    const std::string name = kernel_name(plan.kernel);
    if (plan.kernel == Kernel::cudnn) return name;
    return name + " " + std::to_string(plan.tile.m) + "x" + std::to_string(plan.tile.n) + "x" + std::to_string(plan.tile.k) +
           family_of(plan.kernel).describe(plan);
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
