// Rounding of float32 operands to tf32. Tensor cores truncate, which would bias every product the same way.
#pragma once

#include <cstdint>
#include <cstring>

#include <device/device.cuh>

namespace fused_cna {

// A value as an MMA operand: float32 is rounded to tf32.
template <class T>
__device__ __forceinline__ T as_operand(T value) {
    if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        bits = device::round_to_tf32(bits);
        memcpy(&value, &bits, sizeof(bits));
    }
    return value;
}

template <int Count, int Words>
__device__ __forceinline__ void round_to_tf32(uint32_t (&fragments)[Count][Words]) {
#pragma unroll
    for (auto& words : fragments) {
#pragma unroll
        for (uint32_t& word : words) word = device::round_to_tf32(word);
    }
}

}  // namespace fused_cna
