// The start of every kernel: earlier kernels on its stream may still run.
#pragma once

#include <device/device.cuh>

#include "args.h"

namespace fused_cna {

// Where kernels can start early, tables made from arguments alone cost nothing while earlier kernels end. Elsewhere a kernel
// first starts its loads, and makes the tables while these are in flight.
inline constexpr bool prepares_ahead = device::is_hopper;

// Every thread must call it before it reads or writes global memory; work on arguments alone belongs before it. While it
// waits it prefetches the weight into the L2: earlier kernels rarely write it, and its values are only read afterwards, in
// case one did. After it the next kernel may start in turn.
__device__ __forceinline__ void await_kernels_ahead(const ConvArgs& args, int threads) {
    if constexpr (device::is_hopper) {
        const uint64_t first = static_cast<uint64_t>(device::block_x()) * threads + device::thread_x();
        const auto weight = static_cast<const char*>(args.weight);
#pragma unroll 1
        for (uint64_t line = first; line < args.weight_lines; line += static_cast<uint64_t>(device::grid_x()) * threads) {
            device::prefetch(weight + line * l2_line_bytes);
        }
    }
    device::await_prerequisites();
    device::launch_dependents();
}

}  // namespace fused_cna
