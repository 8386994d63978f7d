// What the plan wants to know of a CUDA device that is there.
#pragma once

#include <c10/core/Device.h>

#include "plan/device.h"

namespace fused_cna {

// Read once per device: the attributes do not change, and asking for the clocks is slow. Throws c10::Error for a device too
// old for any kernel.
const DeviceInfo& device_info(c10::DeviceIndex device);

}  // namespace fused_cna
