// Fold, residual, activation, rounding, store of neighbouring output channels: the end of every kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include <device/types.cuh>
#include <device/vector.cuh>

#include "../epilogue.h"
#include "activation.cuh"
#include "fold.cuh"

namespace fused_cna::kernels {

// Neighbouring output channels of one pixel in memory. The stride is in elements.
template <class T>
struct Channels {
    T* data;
    int64_t stride;
};

// 16-byte accesses need all Width channels to exist, to lie densely and to start on a 16-byte boundary.
template <int Width, class T>
__device__ __forceinline__ bool takes_vectors(const Channels<T>& channels, int valid) {
    return valid == Width && channels.stride == 1 && device::is_aligned_16(channels.data);
}

template <int Width, class T>
__device__ __forceinline__ void load_channels(const Channels<const T>& source, int valid, float (&values)[Width]) {
    if constexpr (Width % device::values_per_vector<T> == 0) {
        if (takes_vectors<Width>(source, valid)) return device::load_vector(source.data, values);
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] = i < valid ? device::to_float(source.data[i * source.stride]) : 0.0f;
}

template <int Width, class T>
__device__ __forceinline__ void store_channels(const Channels<T>& destination, int valid, const float (&values)[Width]) {
    if constexpr (Width % device::values_per_vector<T> == 0) {
        if (takes_vectors<Width>(destination, valid)) return device::store_vector(destination.data, values);
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) {
        if (i < valid) destination.data[i * destination.stride] = device::from_float<T>(values[i]);
    }
}

// Finishes and stores Width neighbouring output channels of one pixel, of which the first `valid` exist. `residual` holds
// zeros where the layer has none. Its memory may be that of y, so all of it is read before anything is stored.
template <int Width, class T>
__device__ __forceinline__ void finish_channels(const float (&accumulators)[Width], const ChannelFold (&folds)[Width],
                                                int valid, const float (&residual)[Width], const Channels<T>& y,
                                                const Epilogue& epilogue) {
    float values[Width];
    const bool add_first = epilogue.residual_order == ResidualOrder::add_act;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
        const float z = fmaf(accumulators[i] - folds[i].offset, folds[i].scale, folds[i].beta);
        values[i] = add_first ? z + residual[i] : z;
    }
    activate(values, epilogue.activation, epilogue.activation_param);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] = add_first ? values[i] : values[i] + residual[i];
    store_channels<Width, T>(y, valid, values);
}

// The same with the residual in memory; residual.data is null where the layer has none.
template <int Width, class T>
__device__ __forceinline__ void finish_channels(const float (&accumulators)[Width], const ChannelFold (&folds)[Width],
                                                int valid, const Channels<const T>& residual, const Channels<T>& y,
                                                const Epilogue& epilogue) {
    float added[Width] = {};
    if (residual.data) load_channels<Width, T>(residual, valid, added);
    finish_channels<Width, T>(accumulators, folds, valid, added, y, epilogue);
}

}  // namespace fused_cna::kernels
