// The CUDA runtime's part of a launch. The simulator shadows this file with one of the same name.
#pragma once

#include <cuda_runtime.h>

#include "args.h"

namespace fused_cna::device {

// The block's dynamic shared memory as a T. Static __shared__ is not used: the simulator cannot poison it.
template <class T>
__device__ __forceinline__ T& shared_storage() {
    extern __shared__ __align__(1024) unsigned char raw_shared[];
    return *reinterpret_cast<T*>(raw_shared);
}

struct LaunchShape {
    int64_t blocks;
    int threads;
    int64_t shared_bytes;
    int cluster = 1;  // blocks per cluster; divides `blocks`
};

// Null, or the error message. Clears the runtime's error too, else the next check would blame another launch.
inline const char* in_words(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

inline const char* find_current_device(int& device) { return in_words(cudaGetDevice(&device)); }

// The most shared memory that a block can use on a device.
inline const char* find_shared_bytes(int device, int& bytes) {
    return in_words(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Allows launches of a kernel on the current device this much dynamic shared memory, and no more.
template <class... P>
const char* set_shared_limit(void (*kernel)(P...), int bytes) {
    return in_words(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class... P, class... A>
const char* start(void (*kernel)(P...), const LaunchShape& shape, Stream stream, const A&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream.handle;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (shape.cluster > 1) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
    if (stream.starts_early) {
        cudaLaunchAttribute& early = attributes[config.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    return in_words(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace fused_cna::device
