// Measured plans: for a problem on a device they replace the estimate. Host only.
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

// Makes the plan with this whole name, as to_string prints it, the one for the problem on the device. Where no legal plan
// has the name, nothing changes and the result says why; else it is empty.
std::string set_tuned_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

std::optional<Plan> find_tuned_plan(const ConvProblem& problem, const DeviceInfo& device);
std::vector<TunedPlan> list_tuned_plans();
void clear_tuned_plans();

// Changes with every change of the table: a choice remembered under an older number may be out of date.
uint64_t tuned_plans_version();

// Called with the index of each CUDA device before the first plan for it is chosen, to set its known plans: a process that
// runs no kernel reads none.
using TunedPlanLoader = void (*)(int device_index);
void set_tuned_plan_loader(TunedPlanLoader loader);
void load_tuned_plans_once(int device_index);

}  // namespace fused_cna
