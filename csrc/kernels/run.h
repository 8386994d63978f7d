// From kernel arguments and a plan to a launch. Free of torch, so that the simulator runs the same path.
#pragma once

#include "args.h"
#include "plan/plan.h"

namespace fused_cna {

// Launches the planned kernel on the stream and returns without waiting. An empty output launches nothing. args.workspace
// holds plan.workspace_bytes; x and the weight have been copied where the plan says so. Throws std::runtime_error with the
// problem, the plan and the cause where the launch fails.
void run(ConvArgs args, const Plan& plan, Stream stream);

// Whether the driver encodes tensor maps, which some plans for compute capability 9.0 need.
bool has_tensor_maps();

// The maps that the driver has refused so far in this process.
RefusedMaps refused_tensor_maps();

}  // namespace fused_cna
