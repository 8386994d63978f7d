// Tensor maps, encoded by the driver, which is looked up at run time. The simulator shadows this file with one of the same
// name.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <device/runtime.cuh>

#include "device/map_geometry.h"

namespace fused_cna::device {

using TensorMap = CUtensorMap;

namespace driver {

// Both functions exist since CUDA 12.0.
template <class Function>
Function* find_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        return nullptr;
    }
    return reinterpret_cast<Function*>(function);
}

inline auto* encode_tiled() {
    static auto* const function = find_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    return function;
}

inline auto* encode_im2col() {
    static auto* const function = find_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
    return function;
}

inline int version() {
    static const int number = [] {
        int found = 0;
        return cudaDriverGetVersion(&found) == cudaSuccess ? found : 0;
    }();
    return number;
}

}  // namespace driver

// Whether the driver can encode maps.
inline bool has_tensor_maps() { return driver::encode_tiled() && driver::encode_im2col(); }

// Encoding needs a context, which a thread that has not used the device yet may lack: setting the device makes one.
inline bool binds_context() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}

// Null, or why there is no map.
inline const char* encode_map(const MapGeometry& geometry, TensorMap& map) {
    if (!has_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled or no cuTensorMapEncodeIm2col";
    const CUtensorMapDataType type = geometry.dtype == DType::float16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                     : geometry.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const CUtensorMapSwizzle swizzle =
        geometry.swizzle_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    constexpr int most = MapGeometry::most_dimensions;
    cuuint64_t sizes[most], strides[most - 1];
    cuuint32_t box[most], steps[most] = {1, 1, 1, 1};
    int64_t extent = 1;
    for (int i = 0; i < geometry.rank; ++i) {
        sizes[i] = static_cast<cuuint64_t>(geometry.sizes[i]);
        box[i] = static_cast<cuuint32_t>(geometry.box[i]);
        if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(geometry.strides[i]);
        extent += (geometry.sizes[i] - 1) * (i > 0 ? geometry.strides[i] : size_in_bytes(geometry.dtype));
    }
    void* address = const_cast<void*>(geometry.address);
    const auto rank = static_cast<cuuint32_t>(geometry.rank);
    // Corners and steps begin with the innermost dimension, W, as in CUTLASS, Triton and cubecl; cuda.h says "DHW" instead.
    // tests/gpu/hopper_probe.cu checks it on hardware.
    const int lower[] = {geometry.lower_w, geometry.lower_h}, upper[] = {geometry.upper_w, geometry.upper_h};
    if (geometry.is_im2col) {
        steps[1] = static_cast<cuuint32_t>(geometry.step_w);
        steps[2] = static_cast<cuuint32_t>(geometry.step_h);
    }
    const auto encode = [&] {
        if (geometry.is_im2col) {
            return driver::encode_im2col()(&map, type, rank, address, sizes, strides, lower, upper,
                                           static_cast<cuuint32_t>(geometry.channels),
                                           static_cast<cuuint32_t>(geometry.pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                           swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        }
        return driver::encode_tiled()(&map, type, rank, address, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult result = encode();
    if (result == CUDA_ERROR_INVALID_CONTEXT && binds_context()) result = encode();
    if (result != CUDA_SUCCESS) return "the driver refused to encode a tensor map";
    // Drivers up to CUDA 13.1 set a bit that is wrong for tensors under 128 KiB; CUTLASS and Triton clear it too.
    constexpr int last_wrong_version = 13010;
    constexpr int64_t small_tensor = 128 * 1024;
    constexpr cuuint64_t wrong_bit = cuuint64_t{1} << 21;
    if (driver::version() <= last_wrong_version && extent < small_tensor) map.opaque[1] &= ~wrong_bit;
    return nullptr;
}

}  // namespace fused_cna::device
