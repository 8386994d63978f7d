// Plans that were measured: for a problem on a device they take the place of the estimate. Host only.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "plan/device.h"
#include "plan/plan.h"
#include "problem.h"

namespace fused_cna {

struct TunedPlan {
    ConvProblem problem;
    DeviceInfo device;
    Plan plan;
};

// From now on the plan of this full name, as to_string prints it, is the one for the problem on the device. A name that no
// legal plan has changes nothing, and the answer says why; it is empty where the plan was taken.
std::string set_tuned_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

std::optional<Plan> find_tuned_plan(const ConvProblem& problem, const DeviceInfo& device);
std::vector<TunedPlan> list_tuned_plans();
void clear_tuned_plans();

// Another number after every change of the table: a choice that was remembered under an older one may be out of date.
uint64_t tuned_plans_version();

// Is called with the index of each CUDA device before the first plan for it is chosen, to set the plans known for it: a
// process that runs no kernel reads none.
using TunedPlanLoader = void (*)(int device_index);
void set_tuned_plan_loader(TunedPlanLoader loader);
void load_tuned_plans_once(int device_index);

}  // namespace fused_cna
