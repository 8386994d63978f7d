// What the plan needs to know of an installed CUDA device.
#pragma once

#include <c10/core/Device.h>

#include "plan/device.h"

namespace fused_cna {

// Read once per device: the attributes do not change, and reading the clocks is slow. Throws c10::Error for a device too old
// for every kernel.
const DeviceInfo& device_info(c10::DeviceIndex device);

// Whether kernels on the device are launched to start early: where the device can, unless allow_early_starts(false).
bool launches_start_early(const DeviceInfo& device);

// For comparisons. Returns the previous setting.
bool allow_early_starts(bool allowed);

}  // namespace fused_cna
