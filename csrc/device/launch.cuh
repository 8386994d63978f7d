// Dynamic shared memory, and the one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../stream.h"

namespace fused_cna::device {

// The block's dynamic shared memory as a T. Static __shared__ is not used: a simulator could not poison it.
template <class T>
__device__ __forceinline__ T& shared_storage() {
    extern __shared__ __align__(1024) unsigned char raw_shared[];
    return *reinterpret_cast<T*>(raw_shared);
}

struct LaunchShape {
    int64_t blocks;
    int threads;
    int64_t shared_bytes;
};

// The error in words, taken from the runtime as well: whoever asks it next would blame the wrong launch.
inline const char* taken_error(cudaError_t error) {
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// Returns null, or the error in words.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const LaunchShape& shape, Stream stream, A... args) {
    constexpr int64_t default_shared_bytes = 48 * 1024;  // more has to be asked for, per kernel
    if (shape.shared_bytes > default_shared_bytes) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
        if (error != cudaSuccess) return taken_error(error);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    return error == cudaSuccess ? nullptr : taken_error(error);
}

}  // namespace fused_cna::device
