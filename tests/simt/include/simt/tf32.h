#pragma once
#include <cstdint>

namespace simt {

// PTX ISA, "Data Movement and Conversion Instructions: cvt", .rna.tf32.f32: rounds the fraction to 10 bits, to nearest, ties
// away from zero; the upper 19 bits are the result. The lower 13 are unspecified: here they keep what the addition left in
// them, as in the machine code of the instruction. Infinities stay. A NaN stays a NaN; the manual does not say which for
// every payload, here it becomes the canonical NaN.
inline uint32_t round_to_tf32(uint32_t bits) {
    constexpr uint32_t infinity = 0x7F800000, canonical_nan = 0x7FFFFFFF, half_a_step = 0x1000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    if (magnitude > infinity) return canonical_nan;
    if (magnitude == infinity) return bits;
    // a carry out of the fraction raises the exponent, as it must
    return bits + half_a_step;
}

}  // namespace simt
