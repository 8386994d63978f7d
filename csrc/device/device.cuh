// All that a kernel includes from csrc/device, the only folder with inline PTX and CUDA headers.
#pragma once

#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/runtime.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>
