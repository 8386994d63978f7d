// What kernels stand on, whole.
#pragma once

#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/runtime.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>
