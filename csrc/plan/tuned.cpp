#include "plan/tuned.h"

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace fused_cna {

namespace {

using Key = std::pair<ConvProblem, DeviceInfo>;

struct TunedPlans {
    std::shared_mutex mutex;
    std::map<Key, Plan> plans;
    std::atomic<uint64_t> version = 0;
} tuned;

struct Loading {
    std::atomic<TunedPlanLoader> loader = nullptr;
    std::array<std::atomic<bool>, 128> done{};  // by device index, which torch holds in 7 bits
} loading;

}  // namespace

std::string set_tuned_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name) {
    const Candidate found = find_exact_plan(problem, device, name);
    if (!found.is_supported()) return found.unsupported_reason;
    const std::unique_lock lock(tuned.mutex);
    tuned.plans.insert_or_assign({problem, device}, found.plan);
    ++tuned.version;
    return "";
}

std::optional<Plan> find_tuned_plan(const ConvProblem& problem, const DeviceInfo& device) {
    const std::shared_lock lock(tuned.mutex);
    const auto found = tuned.plans.find({problem, device});
    return found == tuned.plans.end() ? std::nullopt : std::optional(found->second);
}

std::vector<TunedPlan> list_tuned_plans() {
    const std::shared_lock lock(tuned.mutex);
    std::vector<TunedPlan> all;
    for (const auto& [key, plan] : tuned.plans) all.push_back({key.first, key.second, plan});
    return all;
}

void clear_tuned_plans() {
    const std::unique_lock lock(tuned.mutex);
    tuned.plans.clear();
    ++tuned.version;
}

uint64_t tuned_plans_version() { return tuned.version; }

void set_tuned_plan_loader(TunedPlanLoader loader) { loading.loader = loader; }

void load_tuned_plans_once(int device_index) {
    std::atomic<bool>& done = loading.done.at(device_index);
    if (done) return;
    // No lock is held: a loader that waits for the GIL could deadlock on it. Threads that arrive at the same time each call
    // the loader; none continues before its call returns.
    if (const TunedPlanLoader loader = loading.loader) loader(device_index);
    done = true;
}

}  // namespace fused_cna
