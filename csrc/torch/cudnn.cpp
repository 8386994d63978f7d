#include "torch/cudnn.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

struct Folded {
    Tensor weight;
    MaybeTensor bias;
};

// Returns the tensor itself where it is float32 already, so the result must not be written to.
Tensor as_float32(const Tensor& tensor) { return tensor.to(at::kFloat); }

Folded fold(const Inputs& in) {
    if (!in.running_mean) return {in.weight, in.bias};
    Tensor scale = as_float32(*in.running_var).add(in.eps).rsqrt_();
    if (in.norm_weight) scale.mul_(as_float32(*in.norm_weight));
    const Tensor mean = as_float32(*in.running_mean);
    Tensor shift = (in.bias ? as_float32(*in.bias).sub(mean) : mean.neg()).mul_(scale);
    if (in.norm_bias) shift.add_(as_float32(*in.norm_bias));
    Tensor weight = at::empty_like(in.weight);
    at::mul_out(weight, in.weight, scale.view({-1, 1, 1, 1}));
    return {weight, shift.to(in.x.scalar_type())};
}

struct Padded {
    Tensor x;
    std::array<int64_t, 2> padding;
};

// cuDNN pads both sides alike; the difference is padded into x.
Padded pad(const Inputs& in) {
    if (in.padding.size() == 2) return {in.x, {in.padding[0], in.padding[1]}};
    const int64_t top = in.padding[0], bottom = in.padding[1], left = in.padding[2], right = in.padding[3];
    const int64_t height = std::min(top, bottom), width = std::min(left, right);
    if (top == bottom && left == right) return {in.x, {height, width}};
    return {at::constant_pad_nd(in.x, {left - width, right - width, top - height, bottom - height}), {height, width}};
}

void activate(Tensor& z, Activation activation, at::ArrayRef<double> params) {
    switch (activation) {
        case Activation::identity: return;
        case Activation::relu: at::relu_(z); return;
        case Activation::relu6: at::relu6_(z); return;
        case Activation::leaky_relu: at::leaky_relu_(z, params[0]); return;
        case Activation::elu: at::elu_(z, params[0]); return;
        case Activation::silu: at::silu_(z); return;
        case Activation::gelu: at::gelu_(z); return;
        case Activation::gelu_tanh: at::gelu_(z, "tanh"); return;
        case Activation::hardswish: at::hardswish_(z); return;
        case Activation::hardsigmoid: at::hardsigmoid_(z); return;
        case Activation::sigmoid: at::sigmoid_(z); return;
        case Activation::tanh: at::tanh_(z); return;
        case Activation::mish: at::mish_(z); return;
    }
}

// cuDNN's convolution with ReLU in one kernel. Empty where cuDNN has no engine for the problem: it has fewer than for the
// convolution alone. Out of memory is rethrown; a lost device raises again in the next call.
MaybeTensor fused_with_relu(const Inputs& in, const Padded& padded, const Folded& folded) {
    try {
        if (in.residual) {
            return at::cudnn_convolution_add_relu(padded.x, folded.weight, *in.residual, 1, folded.bias, in.stride,
                                                  padded.padding, in.dilation, in.groups);
        }
        return at::cudnn_convolution_relu(padded.x, folded.weight, folded.bias, in.stride, padded.padding, in.dilation,
                                          in.groups);
    } catch (const c10::OutOfMemoryError&) {
        throw;
    } catch (const c10::Error&) {
        return std::nullopt;
    }
}

}  // namespace

Tensor conv_norm_act_by_cudnn(const Inputs& in, const CheckedInputs& checked) {
    const Folded folded = fold(in);
    const Padded padded = pad(in);
    const auto order = in.residual ? std::optional(checked.residual_order) : std::nullopt;
    const bool add_first = order == ResidualOrder::add_act, add_last = order == ResidualOrder::act_add;
    const bool cudnn_has_it = in.x.is_cuda() && at::globalContext().userEnabledCuDNN() &&
                              checked.activation == Activation::relu && passes_after_cudnn(checked.activation, order) == 0;
    if (cudnn_has_it) {
        if (MaybeTensor y = fused_with_relu(in, padded, folded)) return *y;
    }
    Tensor z = at::convolution(padded.x, folded.weight, folded.bias, in.stride, padded.padding, in.dilation,
                               /*transposed=*/false, /*output_padding=*/{0, 0}, in.groups);
    if (add_first) z.add_(*in.residual);
    activate(z, checked.activation, in.act_params);
    if (add_last) z.add_(*in.residual);
    return z;
}

}  // namespace fused_cna
