// Division by a number known before the launch.
#pragma once

#include <cstdint>

namespace fused_cna {

// Divides numbers from 0 to 2^31 - 1 by a positive divisor known to the host: a multiplication instead of some twenty
// dependent instructions. Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
    int value = 1;
    uint32_t factor = 1;
    int shift = 0;

    constexpr Divisor() = default;
    constexpr explicit Divisor(int64_t divisor) : value(static_cast<int>(divisor)) {
        while (int64_t{1} << shift < divisor) ++shift;
        const auto d = static_cast<uint64_t>(divisor);
        factor = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
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

}  // namespace fused_cna
