// One hardware feature per function. Blocks and grids are one-dimensional; warp functions need all 32 lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_cna::device {

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t grid_x() { return gridDim.x; }
__device__ __forceinline__ int lane() { return thread_x() % 32; }
__device__ __forceinline__ int warp() { return thread_x() / 32; }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// bar.sync: waits until `threads` threads, a multiple of 32, have reached barrier `id` (0 is sync_threads' own).
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int source_lane) {
    return __shfl_sync(0xffffffffu, value, source_lane);
}

__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

}  // namespace fused_cna::device
