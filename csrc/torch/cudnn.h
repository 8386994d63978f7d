// The operator by way of cuDNN: for the problems where it measured faster than every kernel here.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/check.h"

namespace fused_cna {

// The formula with the norm folded into the weight and the bias, on the device, in float32 rounded once: nothing folded is
// kept between calls. Bias and ReLU, and a residual before it, are part of cuDNN's convolution; whatever else follows is
// done in place. The result's strides are those that cuDNN gives it. Runs on a CPU too, where torch's convolution takes the
// place of cuDNN's.
at::Tensor conv_norm_act_by_cudnn(const Inputs& in, const CheckedInputs& checked);

}  // namespace fused_cna
