// The plan's estimates: explicit, coarse, and meant to be fitted to measurements.
#pragma once

#include "conv_problem.h"
#include "device_info.h"
#include "plan.h"

namespace fused_cna {

// How many blocks of a tile run on one multiprocessor at a time; 0 where not even one fits.
int64_t resident_blocks(const GemmTile& tile, const DeviceInfo& device);

Estimate estimate_direct(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device);
Estimate estimate_implicit_gemm(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device);

}  // namespace fused_cna
