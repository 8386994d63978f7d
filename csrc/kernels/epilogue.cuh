// Fold, residual, activation, rounding, store: the end of every kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "activation.cuh"
#include "rows.cuh"

namespace fused_cna::kernels {

// Batch norm and conv bias of one output channel, applied as z = (acc - offset) * scale + beta. In this form the error does
// not exceed that of the separate operations; with the offset multiplied out it does, where mean and accumulator cancel.
struct ChannelFold {
    float scale;
    float offset;
    float beta;
};

template <class T>
__device__ __forceinline__ float load_norm(const void* vector, int64_t channel, bool is_float32) {
    if (is_float32) return static_cast<const float*>(vector)[channel];
    return device::to_float(static_cast<const T*>(vector)[channel]);
}

// Folds the raw vectors of one channel: done once per channel and block, the result kept in shared memory.
template <class T>
__device__ __forceinline__ ChannelFold fold_channel(const Epilogue& epilogue, int64_t channel) {
    const float bias = epilogue.bias ? device::to_float(static_cast<const T*>(epilogue.bias)[channel]) : 0.0f;
    if (!epilogue.running_mean) return {1.0f, -bias, 0.0f};
    const bool is_float32 = epilogue.norm_is_float32;
    const float mean = load_norm<T>(epilogue.running_mean, channel, is_float32);
    const float var = load_norm<T>(epilogue.running_var, channel, is_float32);
    const float gamma = epilogue.norm_weight ? load_norm<T>(epilogue.norm_weight, channel, is_float32) : 1.0f;
    const float beta = epilogue.norm_bias ? load_norm<T>(epilogue.norm_bias, channel, is_float32) : 0.0f;
    return {gamma / sqrtf(var + epilogue.eps), mean - bias, beta};
}

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

// Finishes and stores Width neighbouring output channels of one pixel, of which the first `valid` exist. residual.data is
// null where the layer has none; it may be y.data, so all of it is read before anything is stored.
template <int Width, class T>
__device__ __forceinline__ void finish_channels(const float (&accumulators)[Width], const ChannelFold* folds, int valid,
                                                const Channels<const T>& residual, const Channels<T>& y,
                                                const Epilogue& epilogue) {
    float values[Width];
    float added[Width] = {};
    if (residual.data) load_channels<Width, T>(residual, valid, added);
    const bool add_first = epilogue.residual_order == ResidualOrder::add_act;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
        const float z = fmaf(accumulators[i] - folds[i].offset, folds[i].scale, folds[i].beta);
        values[i] = add_first ? z + added[i] : z;
    }
    activate(values, epilogue.activation, epilogue.activation_param);
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] = add_first ? values[i] : values[i] + added[i];
    store_channels<Width, T>(y, valid, values);
}

// Where a block's columns lie among the output channels, and how many of them exist.
struct ColumnRange {
    int64_t first_channel;
    int count;
};

// Finishes and stores a tile of accumulators that lies in shared memory, Rows x Columns, rows `Pitch` apart.
template <class T, int Rows, int Columns, int Pitch, int Threads>
__device__ __forceinline__ void store_tile(const ConvArgs& args, const float* accumulators, const RowPlace* places,
                                           const ChannelFold* folds, const ColumnRange& columns) {
    constexpr int width = Columns % 8 == 0 ? 8 : 1, stores_per_row = Columns / width;
    // Neighbouring threads write along whichever dimension of y is dense: channels, or else pixels.
    const bool channels_dense = args.y_strides.c == 1;
#pragma unroll 1
    for (int i = device::thread_x(); i < Rows * stores_per_row; i += Threads) {
        const int row = channels_dense ? i / stores_per_row : i % Rows;
        const int column = (channels_dense ? i % stores_per_row : i / Rows) * width;
        const RowPlace& place = places[row];
        const int remaining = columns.count - column;
        if (!place.exists || remaining <= 0) continue;
        float values[width];
        const float* staged = accumulators + row * Pitch + column;
        if constexpr (width == 8 && Pitch % 4 == 0) {
            device::load_vector(staged, values);
        } else {
#pragma unroll
            for (int j = 0; j < width; ++j) values[j] = staged[j];
        }
        const int64_t channel = columns.first_channel + column;
        const T* residual = static_cast<const T*>(args.residual);
        finish_channels<width, T>(
            values, folds + column, remaining < width ? remaining : width,
            {residual ? residual + place.residual + channel * args.residual_strides.c : nullptr, args.residual_strides.c},
            {static_cast<T*>(args.y) + place.y + channel * args.y_strides.c, args.y_strides.c}, args.epilogue);
    }
}

}  // namespace fused_cna::kernels
