// What the operator refuses, before anything is allocated or launched: the conditions. The words of a refusal stand once, in
// fused_cna/_checks.py, which has the same conditions for installations without this extension; tests hold the two together.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "args.h"

namespace fused_cna {

using MaybeTensor = std::optional<at::Tensor>;

// The operator's arguments, by reference, in the order of its schema.
struct Inputs {
    const at::Tensor& x;
    const at::Tensor& weight;
    const MaybeTensor& bias;
    const MaybeTensor& norm_weight;
    const MaybeTensor& norm_bias;
    const MaybeTensor& running_mean;
    const MaybeTensor& running_var;
    double eps;
    at::IntArrayRef stride;
    at::IntArrayRef padding;
    at::IntArrayRef dilation;
    int64_t groups;
    std::string_view act;
    at::ArrayRef<double> act_params;
    const MaybeTensor& residual;
    std::string_view residual_order;
};

struct CheckedInputs {
    DType dtype;
    Activation activation;
    ResidualOrder residual_order;
};

// Both raise what the Python checks raise: a RuntimeError that says what was given and what is allowed.
CheckedInputs check_inputs(const Inputs& in);

// What has the output's size: the residual, and memory given for the output, which may be null. That shares no element with
// an input but the residual, where it is out itself: every element is read by the thread that writes it, before it does.
void check_output(const Inputs& in, const ConvProblem& problem, const at::Tensor* out);

}  // namespace fused_cna
