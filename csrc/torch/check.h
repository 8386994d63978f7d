// The conditions of a valid call, checked before anything is allocated or launched. The messages are only in
// fused_cna/_checks.py, which has the same conditions for installations without this extension; tests compare the two.
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

// Both raise what the Python checks raise: a RuntimeError with what was given and what is allowed.
CheckedInputs check_inputs(const Inputs& in);

// Checks the tensors of the output's size: the residual, and `out` (null where not given). `out` may share elements with no
// input but the residual, and only if it is the residual: the thread that writes an element reads it first.
void check_output(const Inputs& in, const ConvProblem& problem, const at::Tensor* out);

}  // namespace fused_cna
