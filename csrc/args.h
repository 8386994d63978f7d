// What a kernel gets: operands, epilogue, stream. Names, pointers and numbers only: no launcher, no plan, no CUDA header.
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <string_view>

#include "problem.h"

struct CUstream_st;

namespace fused_cna {

// Where kernels are launched, and how.
struct Stream {
    CUstream_st* handle = nullptr;
    // Programmatic dependent launch: a kernel may start while the one ahead of it still runs. For devices of compute
    // capability 9.0 whose code waits for it (device::await_prerequisites).
    bool starts_early = false;
    // All that the host does for a launch but the launch itself, to be timed where there is no GPU.
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
    std::string_view param;  // the name of the one number in act_params; empty where it holds none
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

// An activation with its parameter. Most layers only clamp: given as bounds, the commonest activations cost two
// instructions, fewer than the switch would.
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

// How many separate passes over the output remain on cuDNN's route, whose convolutions have bias and ReLU, and a residual
// before the ReLU.
constexpr int64_t passes_after_cudnn(Activation activation, std::optional<ResidualOrder> residual) {
    if (activation == Activation::relu && residual != ResidualOrder::act_add) return 0;
    return (activation != Activation::identity) + residual.has_value();
}

// Each vector has K elements, is contiguous, and is null where the layer has none. The conv bias has the storage type; the
// four norm vectors are all float32 or all the storage type. They stay as trained: the kernel folds them on every call, so
// nothing derived from a parameter can go stale.
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

// Strides are in elements, in the order of torch's NCHW view whatever the memory format; any of them may be 0.
struct Strides {
    int64_t n = 0, c = 0, h = 0, w = 0;
};

struct FilterStrides {
    int64_t k = 0, c = 0, r = 0, s = 0;
};

// A plain record: passed to kernels by value.
struct ConvArgs {
    ConvProblem problem;
    const void* x = nullptr;  // [N, C, H, W]
    Strides x_strides;
    const void* weight = nullptr;  // [K, C / groups, R, S]
    FilterStrides weight_strides;
    // [N, K, P, Q], or null. It may be y itself: an element is read by the thread that stores it, before it does.
    const void* residual = nullptr;
    Strides residual_strides;
    void* y = nullptr;  // [N, K, P, Q]; may lie between the elements of x, but shares none with it
    Strides y_strides;
    Epilogue epilogue;
    // Whether every pixel's residual channels lie densely, and begin on a 16-byte boundary where those of the first do.
    bool residual_keeps_alignment = false;
    float* workspace = nullptr;  // the plan's workspace_bytes, uninitialised
    // Of the weight, which an early start asks the L2 for; 0 where it does not.
    uint32_t weight_lines = 0;
};

inline constexpr int64_t l2_line_bytes = 128;

}  // namespace fused_cna
