// Sharing out items among the threads of a block without a division per item.
#pragma once

#include <cstdint>

#include <device/ptx.cuh>

namespace fused_cna::kernels::grouped {

// Divides numbers from 0 to 2^31 - 1 by a positive one that the host knows: a multiplication instead of a chain of some
// twenty instructions. Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
    int value = 1;
    uint32_t factor = 1;
    int shift = 0;

    constexpr Divisor() = default;
    constexpr explicit Divisor(int divisor) : value(divisor) {
        while (int64_t{1} << shift < divisor) ++shift;
        factor = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
    }

    constexpr int quotient(int number) const {
        const auto n = static_cast<uint32_t>(number);
        return static_cast<int>((static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift);
    }
    constexpr int remainder(int number) const { return number - quotient(number) * value; }
};

constexpr bool divides_exactly() {
    constexpr int last = 2147483647;
    for (const int divisor : {1, 2, 3, 5, 6, 7, 9, 14, 56, 641, 65537, 1 << 30, last - 1, last}) {
        for (const int near : {0, divisor, divisor > 1 ? last / divisor * divisor : 0, last}) {
            for (const int number : {near > 0 ? near - 1 : 0, near, near < last ? near + 1 : last}) {
                const Divisor given(divisor);
                if (given.quotient(number) != number / divisor || given.remainder(number) != number % divisor) return false;
            }
        }
    }
    return true;
}
static_assert(divides_exactly());

// Items in three dimensions, the fast one first, of which each of `threads` threads takes every `threads`-th. Made on the
// host.
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

// A thread's way through its share: the next item costs two carries.
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

}  // namespace fused_cna::kernels::grouped
