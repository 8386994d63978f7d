// The operators' arguments, as C++ and as a schema.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "torch/check.h"

namespace fused_cna {

// As the dispatcher has them: above the kernels, sizes may be symbolic.
template <class Result, class... Behind>
using SignatureOf = Result(const at::Tensor&, const at::Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                           const MaybeTensor&, const MaybeTensor&, double, c10::SymIntArrayRef, c10::SymIntArrayRef,
                           c10::SymIntArrayRef, c10::SymInt, std::string_view, at::ArrayRef<double>, const MaybeTensor&,
                           std::string_view, Behind...);
using OperatorSignature = SignatureOf<at::Tensor>;
using OutOperatorSignature = SignatureOf<void, const at::Tensor&>;

// Gives a function of Inputs, and of any arguments after them, the operator's signature.
template <auto function, class... Behind>
auto as_operator(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                 const MaybeTensor& norm_bias, const MaybeTensor& running_mean, const MaybeTensor& running_var, double eps,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                 std::string_view act, at::ArrayRef<double> act_params, const MaybeTensor& residual,
                 std::string_view residual_order, Behind... behind) {
    return function({x, weight, bias, norm_weight, norm_bias, running_mean, running_var, eps, stride, padding, dilation,
                     groups, act, act_params, residual, residual_order},
                    behind...);
}

// The schema's arguments of conv_norm_act; the schema is in fused_cna/ops.py, so that it exists without this extension.
inline const std::string arguments =
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, "
    "Tensor? running_var, float eps, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act, "
    "float[] act_params, Tensor? residual, str residual_order";

}  // namespace fused_cna
