// The operator computed by cuDNN, for problems where that measured faster than every kernel here.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/check.h"

namespace fused_cna {

// The norm is folded into weight and bias on the device, in float32, rounded once; nothing folded is kept between calls.
// Bias, ReLU, and a residual before the ReLU are part of cuDNN's convolution; other passes run in place. The result has
// cuDNN's strides. Also runs on a CPU, with torch's convolution in place of cuDNN's.
at::Tensor conv_norm_act_by_cudnn(const Inputs& in, const CheckedInputs& checked);

}  // namespace fused_cna
