// Storage types and their conversions. The simulator shadows this file with one of the same name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fused_cna::device {

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ half from_float<half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

}  // namespace fused_cna::device
