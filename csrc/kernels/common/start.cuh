// How every kernel starts: behind the kernels ahead on its stream, which may still run.
#pragma once

#include <device/device.cuh>

#include "args.h"

namespace fused_cna {

// Tables that are made of arguments alone cost nothing while the kernels ahead end. A kernel that cannot start before that
// asks for its first operands instead, and makes them while those are under way.
inline constexpr bool prepares_ahead = device::is_hopper;

// To be called by every thread, before anything of global memory is read or written. What needs arguments alone is best done
// ahead of it, while the kernels ahead end. Meanwhile the L2 is asked for the weight, which those most often do not touch;
// its values are read afterwards, as one of them may have changed it. Behind it the next kernel may start in turn.
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
