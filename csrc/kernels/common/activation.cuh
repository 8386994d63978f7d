// Activations on float32: the formulas of torch.nn.functional's functions of the same names. A NaN stays a NaN.
#pragma once

#include <cmath>

#include <device/device.cuh>

#include "args.h"

namespace fused_cna {

inline constexpr float sixth = 1.0f / 6.0f;

// x * tanh(log(1 + e^x)). With u = e^x the tanh is u(u + 2) / (u(u + 2) + 2): one exponential instead of three functions.
// Above 20 the tanh rounds to 1, and u would soon overflow.
__device__ __forceinline__ float mish(float x) {
    if (x > 20.0f) return x;
    const float u = device::exponential(x);
    const float v = u * (u + 2.0f);
    return x * v * device::reciprocal(v + 2.0f);
}

template <int AtATime = 8, class Function, int Width>
__device__ __forceinline__ void apply(float (&values)[Width], Function function) {
    if constexpr (Width <= AtATime) {
#pragma unroll
        for (float& value : values) value = function(value);
    } else {
        // Some at a time in a rolled loop, because most functions are long. Registers cannot be indexed, so the array is
        // rotated by as many each turn.
        static_assert(Width % AtATime == 0, "values go round by as many as are done at a time");
#pragma unroll 1
        for (int turn = 0; turn < Width / AtATime; ++turn) {
            float done[AtATime];
#pragma unroll
            for (int i = 0; i < AtATime; ++i) done[i] = function(values[i]);
#pragma unroll
            for (int i = 0; i < Width - AtATime; ++i) values[i] = values[i + AtATime];
#pragma unroll
            for (int i = 0; i < AtATime; ++i) values[Width - AtATime + i] = done[i];
        }
    }
}

// The switch is uniform across the grid and runs once per Width values. A template parameter would multiply the number of
// kernels by 13. erff takes most registers, so a kernel that is short of them asks for fewer at a time.
template <int ErfAtATime = 8, int Width>
__device__ __forceinline__ void activate(float (&values)[Width], const ActivationArgs& activation) {
    if (activation.is_clamp) {
#pragma unroll
        for (float& value : values) value = device::clamp(value, activation.low, activation.high);
        return;
    }
    const float param = activation.param;
    switch (activation.function) {
        case Activation::identity:
        case Activation::relu:
        case Activation::relu6: return;
        case Activation::leaky_relu: return apply(values, [=](float x) { return x > 0.0f ? x : x * param; });
        case Activation::elu: return apply(values, [=](float x) { return x > 0.0f ? x : param * expm1f(x); });
        case Activation::silu:
            return apply(values, [](float x) { return x * device::reciprocal(1.0f + device::exponential(-x)); });
        case Activation::gelu:
            return apply<ErfAtATime>(values, [](float x) {
                constexpr float sqrt_half = 0.70710678118654752f;
                return 0.5f * x * (1.0f + erff(x * sqrt_half));
            });
        case Activation::gelu_tanh:
            return apply(values, [](float x) {
                constexpr float sqrt_two_over_pi = 0.79788456080286536f;
                return 0.5f * x * (1.0f + tanhf(sqrt_two_over_pi * fmaf(0.044715f * x * x, x, x)));
            });
        case Activation::hardswish:
            return apply(values, [](float x) { return x * device::clamp(x + 3.0f, 0.0f, 6.0f) * sixth; });
        case Activation::hardsigmoid:
            return apply(values, [](float x) { return device::clamp(x + 3.0f, 0.0f, 6.0f) * sixth; });
        case Activation::sigmoid:
            return apply(values, [](float x) { return device::reciprocal(1.0f + device::exponential(-x)); });
        case Activation::tanh: return apply(values, [](float x) { return tanhf(x); });
        case Activation::mish: return apply(values, [](float x) { return mish(x); });
    }
}

}  // namespace fused_cna
