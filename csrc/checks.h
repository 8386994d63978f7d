// What the operator refuses, before anything is allocated or launched. The Python side has its twin in fused_cna/_checks.py,
// for installations without this extension; tests hold the two to the same words.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "conv_problem.h"
#include "epilogue.h"

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
    ConvProblem problem;
    ActivationInfo activation;
    ResidualOrder residual_order;
};

// Both throw c10::Error, a RuntimeError in Python, that says what was given and what is allowed.
CheckedInputs check_inputs(const Inputs& in);

// Memory that is to hold the output of checked inputs. Of them only the residual may share it, where it is out itself:
// every element is read by the thread that writes it, before it does.
void check_out(const Inputs& in, const ConvProblem& problem, const at::Tensor& out);

}  // namespace fused_cna
