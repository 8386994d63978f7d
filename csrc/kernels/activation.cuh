// Activations on float32: the formulas of torch.nn.functional's functions of the same names. A NaN stays a NaN.
#pragma once

#include <cmath>

#include <device/types.cuh>

#include "../epilogue.h"

namespace fused_cna::kernels {

// Comparisons rather than fminf and fmaxf, which drop a NaN.
__device__ __forceinline__ float clamp(float x, float low, float high) {
    const float raised = x < low ? low : x;
    return raised > high ? high : raised;
}

// Each takes the value and activation_param, which only LeakyRelu (negative slope) and Elu (alpha) use.
struct Relu {
    __device__ float operator()(float x, float) const { return x < 0.0f ? 0.0f : x; }
};
struct Relu6 {
    __device__ float operator()(float x, float) const { return clamp(x, 0.0f, 6.0f); }
};
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
    __device__ float operator()(float x, float) const { return clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
};
struct Hardswish {
    __device__ float operator()(float x, float) const { return x * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }
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
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] = Function{}(values[i], param);
}

// The same, eight values at a time in a rolled loop: most functions are long. Registers cannot be indexed, so the values go
// round.
template <class Function, int Width>
__device__ __forceinline__ void apply_rolled(float (&values)[Width], float param) {
    if constexpr (Width <= 8) {
        apply<Function>(values, param);
    } else {
#pragma unroll 1
        for (int turn = 0; turn < Width / 8; ++turn) {
            float first[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) first[i] = Function{}(values[i], param);
#pragma unroll
            for (int i = 0; i < Width - 8; ++i) values[i] = values[i + 8];
#pragma unroll
            for (int i = 0; i < 8; ++i) values[Width - 8 + i] = first[i];
        }
    }
}

// The choice is uniform across the grid and taken once per Width values. A template parameter instead would multiply the
// number of kernels by 13. The commonest are asked for first: the switch's jump table alone takes longer than they do.
template <int Width>
__device__ __forceinline__ void activate(float (&values)[Width], Activation activation, float param) {
    static_assert(Width <= 8 || Width % 8 == 0, "values go round by eights");
    if (activation == Activation::identity) return;
    if (activation == Activation::relu) return apply<Relu>(values, param);
    switch (activation) {
        case Activation::identity:
        case Activation::relu: return;
        case Activation::relu6: return apply_rolled<Relu6>(values, param);
        case Activation::leaky_relu: return apply_rolled<LeakyRelu>(values, param);
        case Activation::elu: return apply_rolled<Elu>(values, param);
        case Activation::silu: return apply_rolled<Silu>(values, param);
        case Activation::gelu: return apply_rolled<Gelu>(values, param);
        case Activation::gelu_tanh: return apply_rolled<GeluTanh>(values, param);
        case Activation::hardswish: return apply_rolled<Hardswish>(values, param);
        case Activation::hardsigmoid: return apply_rolled<Hardsigmoid>(values, param);
        case Activation::sigmoid: return apply_rolled<Sigmoid>(values, param);
        case Activation::tanh: return apply_rolled<Tanh>(values, param);
        case Activation::mish: return apply_rolled<Mish>(values, param);
    }
}

}  // namespace fused_cna::kernels
