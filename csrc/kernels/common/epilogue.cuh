// The end of every kernel, for neighbouring output channels: fold, residual, activation, rounding, store.
#pragma once

#include <cmath>
#include <cstring>

#include <device/device.cuh>

#include "kernels/common/activation.cuh"
#include "kernels/common/fold.cuh"
#include "kernels/common/output_pixel.cuh"

namespace fused_cna {

// Neighbouring channels of each of Rows pixels in memory; the first `valid` channels exist. The stride is in elements.
template <int Rows, class T>
struct Channels {
    struct Of {
        T* data;
        bool exists = true;
    } pixels[Rows];
    int64_t stride;
    int valid;

    // 16-byte accesses need all Width channels to exist, to be dense and to start on a 16-byte boundary.
    template <int Width>
    __device__ __forceinline__ bool takes_vectors() const {
        bool are_aligned = true;
#pragma unroll
        for (const Of& pixel : pixels) are_aligned = are_aligned && (!pixel.exists || device::is_aligned_16(pixel.data));
        return valid == Width && stride == 1 && are_aligned;
    }
};

// Reads the channels that exist; the others are zeros.
template <int Width, int Rows, class T>
__device__ __forceinline__ void load_channels(const Channels<Rows, const T>& source,
                                              device::Packed<Rows * Width, T>& values) {
    if constexpr (Width % device::values_per_vector<T> == 0) {
        if (source.template takes_vectors<Width>()) {
            constexpr int pieces = Width / device::values_per_vector<T>;
#pragma unroll
            for (int i = 0; i < Rows * pieces; ++i) {
                const auto& pixel = source.pixels[i / pieces];
                const auto* vectors = reinterpret_cast<const device::Vector16*>(pixel.data);
                values.set_vector(i, pixel.exists ? vectors[i % pieces] : device::Vector16{});
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
                const auto rounded = device::round_values<Width, T>(values + row * Width);
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

// Turns the accumulators of Rows pixels' neighbouring channels into outputs: fold, residual, activate(values).
template <int Rows, int Width, class T, class Activate>
__device__ __forceinline__ void finish_values(float (&values)[Rows * Width], const ChannelFold (&folds)[Width],
                                              bool has_residual, const device::Packed<Rows * Width, T>& residual,
                                              ResidualOrder order, const Activate& activate) {
    const auto add_residual = [&] {
#pragma unroll
        for (int i = 0; i < Rows * Width; ++i) values[i] += residual.value(i);
    };
    const bool add_first = order == ResidualOrder::add_act;
#pragma unroll
    for (int i = 0; i < Rows * Width; ++i) {
        const ChannelFold& fold = folds[i % Width];
        values[i] = fmaf(values[i] - fold.offset, fold.scale, fold.beta);
    }
    if (has_residual && add_first) add_residual();
    activate(values);
    if (has_residual && !add_first) add_residual();
}

template <int Rows, int Width, class T, int ErfAtATime = 8>
__device__ __forceinline__ void finish_values(float (&values)[Rows * Width], const ChannelFold (&folds)[Width],
                                              bool has_residual, const device::Packed<Rows * Width, T>& residual,
                                              const Epilogue& epilogue) {
    finish_values<Rows, Width, T>(values, folds, has_residual, residual, epilogue.residual_order,
                                  [&](float (&all)[Rows* Width]) { activate<ErfAtATime>(all, epilogue.activation); });
}

// The residual of a pixel's channels from `channel` on; null where the layer has none.
template <class T>
__device__ __forceinline__ const T* residual_at(const ConvArgs& args, const RowPlace& place, int64_t channel) {
    if (!args.residual) return nullptr;
    return static_cast<const T*>(args.residual) + place.residual + channel * args.residual_strides.c;
}

// Prefetches a pixel's residual into the L2 while the main loop runs.
template <class T>
__device__ __forceinline__ void prefetch_pixel_residual(const ConvArgs& args, const RowPlace& place, int64_t channel) {
    device::prefetch(residual_at<T>(args, place, channel));
}

// Finishes and stores a pixel's Width neighbouring channels, of which `valid` exist. The residual may be y itself, so all of
// it is read before anything is stored.
template <int Width, class T, int ErfAtATime = 8>
__device__ __forceinline__ void finish_channels(float (&accumulators)[Width], const ChannelFold (&folds)[Width],
                                                const ConvArgs& args, const RowPlace& place, int64_t channel, int valid) {
    device::Packed<Width, T> added;
    const T* residual = residual_at<T>(args, place, channel);
    if (residual) load_channels<Width, 1, T>({{{residual}}, args.residual_strides.c, valid}, added);
    finish_values<1, Width, T, ErfAtATime>(accumulators, folds, residual != nullptr, added, args.epilogue);
    T* y = static_cast<T*>(args.y) + place.y + channel * args.y_strides.c;
    store_channels<Width, 1, T>({{{y}}, args.y_strides.c, valid}, accumulators);
}

}  // namespace fused_cna
