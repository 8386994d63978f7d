// Batch norm and conv bias of an output channel, folded on every call from the trained vectors.
#pragma once

#include <cmath>

#include <device/device.cuh>

#include "args.h"

namespace fused_cna {

// Applied as z = (acc - offset) * scale + beta. In this form the error does not exceed that of the separate operations; with
// the offset multiplied out it does where mean and accumulator cancel.
struct ChannelFold {
    float scale;
    float offset;
    float beta;
};

// The vectors' values for one channel. The constructor starts all five loads and waits for none, so that folding takes one
// memory latency, shared with any other load started before fold().
template <class T>
class ChannelVectors {
   public:
    ChannelVectors() = default;

    __device__ __forceinline__ ChannelVectors(const Epilogue& epilogue, int64_t channel, bool exists) {
        const bool is_float32 = epilogue.norm_is_float32;
        const auto ask = [&](const void* vector, float otherwise) {
            Value value{otherwise, device::from_float<T>(otherwise)};
            if (exists && vector && is_float32) value.wide = static_cast<const float*>(vector)[channel];
            if (exists && vector && !is_float32) value.narrow = static_cast<const T*>(vector)[channel];
            return value;
        };
        mean_ = ask(epilogue.running_mean, 0.0f);
        var_ = ask(epilogue.running_var, 1.0f);
        gamma_ = ask(epilogue.norm_weight, 1.0f);
        beta_ = ask(epilogue.norm_bias, 0.0f);
        bias_ = device::from_float<T>(0.0f);
        if (exists && epilogue.bias) bias_ = static_cast<const T*>(epilogue.bias)[channel];
    }

    __device__ __forceinline__ ChannelFold fold(const Epilogue& epilogue) const {
        const float bias = device::to_float(bias_);
        if (!epilogue.running_mean) return {1.0f, -bias, 0.0f};
        const bool is_float32 = epilogue.norm_is_float32;
        const float scale = gamma_.as_float(is_float32) / sqrtf(var_.as_float(is_float32) + epilogue.eps);
        return {scale, mean_.as_float(is_float32) - bias, beta_.as_float(is_float32)};
    }

   private:
    // In the type it was loaded in: a conversion would wait for the load.
    struct Value {
        float wide;
        T narrow;

        __device__ float as_float(bool is_float32) const { return is_float32 ? wide : device::to_float(narrow); }
    };

    Value mean_, var_, gamma_, beta_;
    T bias_;
};

// A table of neighbouring channels' folds, one channel for each of the block's first threads. The constructor starts the
// loads; store() folds.
template <class T>
class FoldTable {
   public:
    // `size` is the table's length; the first `existing` entries are channels.
    __device__ __forceinline__ FoldTable(const Epilogue& epilogue, int64_t first_channel, int size, int64_t existing)
        : epilogue_(epilogue),
          has_place_(device::thread_x() < size),
          vectors_(epilogue, first_channel + device::thread_x(), has_place_ && device::thread_x() < existing) {}

    __device__ __forceinline__ void store(ChannelFold* folds) const {
        if (has_place_) folds[device::thread_x()] = vectors_.fold(epilogue_);
    }

   private:
    const Epilogue& epilogue_;
    const bool has_place_;
    const ChannelVectors<T> vectors_;
};

}  // namespace fused_cna
