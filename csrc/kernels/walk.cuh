// Sharing out items among the threads of a block without a division per item.
#pragma once

#include <device/ptx.cuh>

namespace fused_cna::kernels {

// Items in three dimensions, the fast one first, of which a thread takes every `threads`-th: the next one costs two
// carries.
class Walk {
   public:
    int fast, middle, slow;

    __device__ Walk(int threads, int fasts, int middles)
        : fast(device::thread_x() % fasts),
          middle(device::thread_x() / fasts % middles),
          slow(device::thread_x() / fasts / middles),
          fasts_(fasts),
          middles_(middles),
          fast_step_(threads % fasts),
          middle_step_(threads / fasts % middles),
          slow_step_(threads / fasts / middles) {}

    __device__ __forceinline__ void advance() {
        const bool carry_fast = fast + fast_step_ >= fasts_;
        fast += fast_step_ - (carry_fast ? fasts_ : 0);
        middle += middle_step_ + carry_fast;
        const bool carry_middle = middle >= middles_;
        middle -= carry_middle ? middles_ : 0;
        slow += slow_step_ + carry_middle;
    }

   private:
    int fasts_, middles_, fast_step_, middle_step_, slow_step_;
};

}  // namespace fused_cna::kernels
