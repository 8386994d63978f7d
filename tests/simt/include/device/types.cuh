// Replaces csrc/device/types.cuh when the kernels are compiled for the simulator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace fused_cna::device {

// IEEE 754 binary16. Opaque, so that a kernel can use it only through csrc/device.
struct half {
    uint16_t bits;
};

// The upper half of an IEEE 754 binary32.
struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
inline float to_float(bfloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

// Rounds to nearest even. PTX ISA, "Data Movement and Conversion Instructions: cvt": a NaN becomes the canonical NaN.
template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline half from_float<half>(float value) {
    if (std::isnan(value)) return {0x7FFF};
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
    if (std::isnan(value)) return {0x7FFF};
    uint32_t bits = std::bit_cast<uint32_t>(value);
    uint32_t below_half = 0x7FFF, lowest_kept = bits >> 16 & 1;  // rounds a tie up only from an odd value
    return {static_cast<uint16_t>((bits + below_half + lowest_kept) >> 16)};
}

}  // namespace fused_cna::device
