// From a call of the operator to its problem: the only place that fills a ConvProblem.
#pragma once

#include <array>
#include <optional>

#include "args.h"

namespace fused_cna {

// A tensor of four dimensions as torch sees it, strides in elements.
struct TensorView {
    const void* data = nullptr;
    std::array<int64_t, 4> sizes{}, strides{};
};

// The parts of a call that the problem depends on.
struct OperatorCall {
    TensorView x, weight;
    std::array<int64_t, 2> stride{};
    std::array<int64_t, 4> padding{};  // top, bottom, left, right
    std::array<int64_t, 2> dilation{};
    int64_t groups = 1;
    DType dtype = DType::float32;
    bool allow_tf32 = false;  // ignored unless dtype is float32
    bool has_norm = false;
    Activation activation = Activation::identity;
    std::optional<ResidualOrder> residual;  // empty where there is no residual
};

// The problem, x and the weight; the caller fills in residual, output and epilogue.
ConvArgs make_args(const OperatorCall& call);

Strides as_strides(const std::array<int64_t, 4>& strides);
FilterStrides as_filter_strides(const std::array<int64_t, 4>& strides);

// Elements from each pixel of n images to the next, if the same within rows, between rows and between images. The second
// overload is for x.
std::optional<int64_t> pixel_step(int64_t n, int64_t h, int64_t w, const Strides& strides);
std::optional<int64_t> pixel_step(const ConvArgs& args);

}  // namespace fused_cna
