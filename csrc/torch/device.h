// What the plan wants to know of a CUDA device that is there.
#pragma once

#include <c10/core/Device.h>

#include "plan/device.h"

namespace fused_cna {

// Read once per device: the attributes do not change, and asking for the clocks is slow. Throws c10::Error for a device too
// old for any kernel.
const DeviceInfo& device_info(c10::DeviceIndex device);

// Whether kernels on the device are launched to start early: where it can, unless the process has asked for none.
bool launches_start_early(const DeviceInfo& device);

// For comparisons. Returns what was set before.
bool allow_early_starts(bool allowed);

}  // namespace fused_cna
