// Fold, residual, activation, rounding, store of neighbouring output channels: the end of every kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "activation.cuh"
#include "fold.cuh"

namespace fused_cna::kernels {

// Neighbouring channels of each of Rows pixels in memory, of which the first `valid` exist. The stride is in elements.
template <int Rows, class T>
struct Channels {
    struct Of {
        T* data;
        bool exists = true;
    } pixels[Rows];
    int64_t stride;
    int valid;

    // 16-byte accesses need all Width channels to exist, to lie densely and to start on a 16-byte boundary.
    template <int Width>
    __device__ __forceinline__ bool takes_vectors() const {
        bool are_aligned = true;
#pragma unroll
        for (const Of& pixel : pixels) are_aligned = are_aligned && (!pixel.exists || device::is_aligned_16(pixel.data));
        return valid == Width && stride == 1 && are_aligned;
    }
};

// Values as they lie in memory: two of 16 bits share a register, and whoever loads them does not wait for them.
template <int Count, class T>
struct Packed {
    uint32_t words[(Count * sizeof(T) + 3) / 4];

    __device__ __forceinline__ float value(int i) const {
        T value;
        memcpy(&value, reinterpret_cast<const unsigned char*>(words) + i * sizeof(T), sizeof(T));
        return device::to_float(value);
    }
};

// The channels that exist, and zeros.
template <int Width, int Rows, class T>
__device__ __forceinline__ void load_channels(const Channels<Rows, const T>& source, Packed<Rows * Width, T>& values) {
    if constexpr (Width % device::values_per_vector<T> == 0) {
        if (source.template takes_vectors<Width>()) {
            constexpr int pieces = Width / device::values_per_vector<T>;
#pragma unroll
            for (int i = 0; i < Rows * pieces; ++i) {
                const auto& pixel = source.pixels[i / pieces];
                const auto* vectors = reinterpret_cast<const device::Vector16*>(pixel.data);
                const device::Vector16 piece = pixel.exists ? vectors[i % pieces] : device::Vector16{};
                memcpy(values.words + i * 4, &piece, 16);
            }
            return;
        }
    }
    T parts[Rows * Width];
#pragma unroll
    for (int i = 0; i < Rows * Width; ++i) {
        const auto& pixel = source.pixels[i / Width];
        const int channel = i % Width;
        const bool exists = pixel.exists && channel < source.valid;
        parts[i] = exists ? pixel.data[channel * source.stride] : device::from_float<T>(0.0f);
    }
    memcpy(values.words, parts, sizeof(parts));
}

template <int Width, int Rows, class T>
__device__ __forceinline__ void store_channels(const Channels<Rows, T>& destination, const float (&values)[Rows * Width]) {
    if constexpr (Width % device::values_per_vector<T> == 0) {
        if (destination.template takes_vectors<Width>()) {
#pragma unroll
            for (int row = 0; row < Rows; ++row) {
                const auto rounded = device::round_vectors<Width, T>(values + row * Width);
                if (destination.pixels[row].exists) rounded.store(destination.pixels[row].data);
            }
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < Rows * Width; ++i) {
        const auto& pixel = destination.pixels[i / Width];
        const int channel = i % Width;
        if (pixel.exists && channel < destination.valid) {
            pixel.data[channel * destination.stride] = device::from_float<T>(values[i]);
        }
    }
}

// Makes outputs of the accumulators of Rows pixels' neighbouring channels: fold, residual, activation.
template <int Rows, int Width, class T>
__device__ __forceinline__ void finish_values(float (&values)[Rows * Width], const ChannelFold (&folds)[Width],
                                              bool has_residual, const Packed<Rows * Width, T>& residual,
                                              const Epilogue& epilogue) {
    const auto add_residual = [&] {
#pragma unroll
        for (int i = 0; i < Rows * Width; ++i) values[i] += residual.value(i);
    };
    const bool add_first = epilogue.residual_order == ResidualOrder::add_act;
#pragma unroll
    for (int i = 0; i < Rows * Width; ++i) {
        const ChannelFold& fold = folds[i % Width];
        values[i] = fmaf(values[i] - fold.offset, fold.scale, fold.beta);
    }
    if (has_residual && add_first) add_residual();
    activate(values, epilogue.activation);
    if (has_residual && !add_first) add_residual();
}

// Finishes and stores the accumulators. `residual` is read where the layer has one. It may be y, so all of it is read before
// anything is stored.
template <int Width, int Rows, class T>
__device__ __forceinline__ void finish_channels(float (&accumulators)[Rows * Width], const ChannelFold (&folds)[Width],
                                                const Channels<Rows, const T>& residual, const Channels<Rows, T>& y,
                                                const ConvArgs& args) {
    Packed<Rows * Width, T> added;
    const bool has_residual = args.residual != nullptr;
    if (has_residual) load_channels<Width, Rows, T>(residual, added);
    finish_values<Rows, Width, T>(accumulators, folds, has_residual, added, args.epilogue);
    store_channels<Width, Rows, T>(y, accumulators);
}

}  // namespace fused_cna::kernels
