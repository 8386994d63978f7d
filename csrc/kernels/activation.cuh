// Activations on float32: the formulas of torch.nn.functional's functions of the same names. A NaN stays a NaN.
#pragma once

#include <cmath>

#include <device/ptx.cuh>
#include <device/types.cuh>

#include "../epilogue.h"

namespace fused_cna::kernels {

// Each takes the value and the activation's number, which only LeakyRelu (negative slope) and Elu (alpha) use.
struct LeakyRelu {
    __device__ float operator()(float x, float negative_slope) const { return x > 0.0f ? x : x * negative_slope; }
};
struct Elu {
    __device__ float operator()(float x, float alpha) const { return x > 0.0f ? x : alpha * expm1f(x); }
};
struct Sigmoid {
    __device__ float operator()(float x, float) const { return 1.0f / (1.0f + expf(-x)); }
};
struct Silu {
    __device__ float operator()(float x, float) const { return x / (1.0f + expf(-x)); }
};
struct Gelu {
    __device__ float operator()(float x, float) const {
        constexpr float sqrt_half = 0.70710678118654752f;
        return 0.5f * x * (1.0f + erff(x * sqrt_half));
    }
};
struct GeluTanh {
    __device__ float operator()(float x, float) const {
        constexpr float sqrt_two_over_pi = 0.79788456080286536f;
        return 0.5f * x * (1.0f + tanhf(sqrt_two_over_pi * fmaf(0.044715f * x * x, x, x)));
    }
};
struct Hardsigmoid {
    __device__ float operator()(float x, float) const { return device::clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
};
struct Hardswish {
    __device__ float operator()(float x, float) const { return x * device::clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
};
struct Tanh {
    __device__ float operator()(float x, float) const { return tanhf(x); }
};
// x * tanh(log(1 + e^x)). With u = e^x the tanh is u(u + 2) / (u(u + 2) + 2): one exponential instead of three functions.
// Beyond 20 it rounds to 1 and u would soon overflow.
struct Mish {
    __device__ float operator()(float x, float) const {
        if (x > 20.0f) return x;
        const float u = expf(x);
        const float v = u * (u + 2.0f);
        return x * (v / (v + 2.0f));
    }
};

template <class Function, int Width>
__device__ __forceinline__ void apply(float (&values)[Width], float param) {
    if constexpr (Width <= 8) {
#pragma unroll
        for (float& value : values) value = Function{}(value, param);
    } else {
        // Eight at a time in a rolled loop, because most functions are long. Registers cannot be indexed, so the values go
        // round.
        static_assert(Width % 8 == 0, "values go round by eights");
#pragma unroll 1
        for (int turn = 0; turn < Width / 8; ++turn) {
            float done[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) done[i] = Function{}(values[i], param);
#pragma unroll
            for (int i = 0; i < Width - 8; ++i) values[i] = values[i + 8];
#pragma unroll
            for (int i = 0; i < 8; ++i) values[Width - 8 + i] = done[i];
        }
    }
}

// The choice is uniform across the grid and made once per Width values. A template parameter instead would multiply the
// number of kernels by 13.
template <int Width>
__device__ __forceinline__ void activate(float (&values)[Width], const ActivationArgs& activation) {
    if (activation.is_clamp) {
#pragma unroll
        for (float& value : values) value = device::clamp(value, activation.low, activation.high);
        return;
    }
    switch (activation.function) {
        case Activation::identity:
        case Activation::relu:
        case Activation::relu6: return;
        case Activation::leaky_relu: return apply<LeakyRelu>(values, activation.param);
        case Activation::elu: return apply<Elu>(values, activation.param);
        case Activation::silu: return apply<Silu>(values, activation.param);
        case Activation::gelu: return apply<Gelu>(values, activation.param);
        case Activation::gelu_tanh: return apply<GeluTanh>(values, activation.param);
        case Activation::hardswish: return apply<Hardswish>(values, activation.param);
        case Activation::hardsigmoid: return apply<Hardsigmoid>(values, activation.param);
        case Activation::sigmoid: return apply<Sigmoid>(values, activation.param);
        case Activation::tanh: return apply<Tanh>(values, activation.param);
        case Activation::mish: return apply<Mish>(values, activation.param);
    }
}

}  // namespace fused_cna::kernels
