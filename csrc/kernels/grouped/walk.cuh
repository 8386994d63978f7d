// Distributes items over the threads of a block without a division per item.
#pragma once

#include <cstdint>

#include <device/device.cuh>

#include "kernels/common/divisor.h"

namespace fused_cna::grouped {

// Items in three dimensions, the fast one first; each of `threads` threads takes every `threads`-th item. Made on the host.
struct Shares {
    Divisor fasts, middles;
    int fast_step = 0, middle_step = 0, slow_step = 0;

    constexpr Shares() = default;
    constexpr Shares(int threads, int of_fasts, int of_middles)
        : fasts(of_fasts),
          middles(of_middles),
          fast_step(threads % of_fasts),
          middle_step(threads / of_fasts % of_middles),
          slow_step(threads / of_fasts / of_middles) {}
};

// A thread's walk through its items: the next one costs two carries.
class Walk {
   public:
    int fast, middle, slow;

    __device__ explicit Walk(const Shares& shares) : shares_(shares) {
        const int row = shares.fasts.quotient(device::thread_x());
        fast = shares.fasts.remainder(device::thread_x());
        middle = shares.middles.remainder(row);
        slow = shares.middles.quotient(row);
    }

    __device__ __forceinline__ void advance() {
        fast += shares_.fast_step;
        const bool carry_fast = fast >= shares_.fasts.value;
        fast -= carry_fast ? shares_.fasts.value : 0;
        middle += shares_.middle_step + carry_fast;
        const bool carry_middle = middle >= shares_.middles.value;
        middle -= carry_middle ? shares_.middles.value : 0;
        slow += shares_.slow_step + carry_middle;
    }

   private:
    const Shares& shares_;
};

}  // namespace fused_cna::grouped
