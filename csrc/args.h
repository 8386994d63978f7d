// What every kernel gets: operands, epilogue, stream. Plain data: no launcher, no plan, no CUDA header.
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <string_view>

#include "problem.h"

struct CUstream_st;

namespace fused_cna {

// The stream of a launch, and the kind of launch.
struct Stream {
    CUstream_st* handle = nullptr;
    // Programmatic dependent launch: the kernel may start while the one before it still runs. Only for devices of compute
    // capability 9.0, whose kernels wait in device::await_prerequisites.
    bool starts_early = false;
    // The host does everything but the launch itself, to be timed on a machine without a GPU.
    bool is_dry = false;
};

enum class Activation : int32_t {
    identity,
    relu,
    relu6,
    leaky_relu,
    elu,
    silu,
    gelu,
    gelu_tanh,
    hardswish,
    hardsigmoid,
    sigmoid,
    tanh,
    mish
};

struct ActivationInfo {
    Activation value;
    std::string_view name;
    std::string_view param;  // the name of the one number in act_params; empty where there is none
};

inline constexpr std::array<ActivationInfo, 13> activations{{
    {Activation::identity, "identity", ""},
    {Activation::relu, "relu", ""},
    {Activation::relu6, "relu6", ""},
    {Activation::leaky_relu, "leaky_relu", "negative_slope"},
    {Activation::elu, "elu", "alpha"},
    {Activation::silu, "silu", ""},
    {Activation::gelu, "gelu", ""},
    {Activation::gelu_tanh, "gelu_tanh", ""},
    {Activation::hardswish, "hardswish", ""},
    {Activation::hardsigmoid, "hardsigmoid", ""},
    {Activation::sigmoid, "sigmoid", ""},
    {Activation::tanh, "tanh", ""},
    {Activation::mish, "mish", ""},
}};

constexpr std::optional<ActivationInfo> find_activation(std::string_view name) {
    for (const ActivationInfo& info : activations) {
        if (info.name == name) return info;
    }
    return std::nullopt;
}

// An activation with its parameter. Most layers only clamp; as bounds that costs two instructions, fewer than the switch.
struct ActivationArgs {
    Activation function = Activation::identity;
    float param = 0;
    bool is_clamp = true;
    float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();

    constexpr ActivationArgs() = default;
    constexpr ActivationArgs(Activation of, float with)
        : function(of),
          param(with),
          is_clamp(of == Activation::identity || of == Activation::relu || of == Activation::relu6) {
        if (of != Activation::identity) low = 0;
        if (of == Activation::relu6) high = 6;
    }
};

// add_act: act(z + residual), as in ResNet. act_add: act(z) + residual, as in darknet and CSP.
enum class ResidualOrder : int32_t { add_act, act_add };

constexpr std::optional<ResidualOrder> find_residual_order(std::string_view name) {
    if (name == "add_act") return ResidualOrder::add_act;
    if (name == "act_add") return ResidualOrder::act_add;
    return std::nullopt;
}

// How many separate passes over the output remain on the cuDNN route, whose fused convolution has bias, ReLU, and a residual
// before the ReLU.
constexpr int64_t passes_after_cudnn(Activation activation, std::optional<ResidualOrder> residual) {
    if (activation == Activation::relu && residual != ResidualOrder::act_add) return 0;
    return (activation != Activation::identity) + residual.has_value();
}

// Each vector has K elements, is contiguous, and is null where the layer has none. The conv bias has the storage type; the
// four norm vectors are all float32 or all the storage type. They are the trained values: the kernel folds them on every
// call, so nothing derived from a parameter can go stale.
struct Epilogue {
    const void* bias = nullptr;
    const void* norm_weight = nullptr;
    const void* norm_bias = nullptr;
    const void* running_mean = nullptr;
    const void* running_var = nullptr;
    float eps = 0;
    bool norm_is_float32 = false;
    ActivationArgs activation;
    ResidualOrder residual_order = ResidualOrder::add_act;
};

// In elements, by dimension of torch's NCHW view whatever the memory format; any of them may be 0.
struct Strides {
    int64_t n = 0, c = 0, h = 0, w = 0;
};

struct FilterStrides {
    int64_t k = 0, c = 0, r = 0, s = 0;
};

// Plain data, passed to kernels by value.
struct ConvArgs {
    ConvProblem problem;
    const void* x = nullptr;  // [N, C, H, W]
    Strides x_strides;
    const void* weight = nullptr;  // [K, C / groups, R, S]
    FilterStrides weight_strides;
    // [N, K, P, Q], or null. May be y itself: the thread that stores an element reads it first.
    const void* residual = nullptr;
    Strides residual_strides;
    void* y = nullptr;  // [N, K, P, Q]; may interleave with the elements of x, but shares none
    Strides y_strides;
    Epilogue epilogue;
    // Whether channels of the residual are dense, and every pixel's are 16-byte aligned where the first pixel's are.
    bool residual_keeps_alignment = false;
    float* workspace = nullptr;  // the plan's workspace_bytes, uninitialised
    // L2 lines of the weight, which a kernel that starts early prefetches; 0 for none.
    uint32_t weight_lines = 0;
};

inline constexpr int64_t l2_line_bytes = 128;

}  // namespace fused_cna
