// How the operands lie in memory, as far as the plan wants to know.
#pragma once

#include <cstdint>
#include <optional>

#include "conv_args.h"

namespace fused_cna {

// The distance from each pixel of x to the next, in elements, if it is the same within a row, between rows and between
// images.
std::optional<int64_t> pixel_step(const ConvArgs& args);

// Fills in problem.x_access, x_pixel_access, weight_access and x_pixels_even from the pointers and strides of x and the
// weight.
void describe_layout(ConvArgs& args);

}  // namespace fused_cna
