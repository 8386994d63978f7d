// From a call of the operator to the problem that it is: the one place where a ConvProblem is filled.
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

// A call, as far as the problem depends on it.
struct OperatorCall {
    TensorView x, weight;
    std::array<int64_t, 2> stride{};
    std::array<int64_t, 4> padding{};  // top, bottom, left, right
    std::array<int64_t, 2> dilation{};
    int64_t groups = 1;
    DType dtype = DType::float32;
    bool allow_tf32 = false;  // counts for float32 alone
    bool has_norm = false;
    Activation activation = Activation::identity;
    std::optional<ResidualOrder> residual;  // none where there is no residual
};

// The problem, with x and the weight as they lie in memory; residual, output and epilogue are left to fill.
ConvArgs make_args(const OperatorCall& call);

Strides as_strides(const std::array<int64_t, 4>& strides);
FilterStrides as_filter_strides(const std::array<int64_t, 4>& strides);

// The distance from each pixel of n images to the next, in elements, if it is the same within a row, between rows and
// between images; the second of x.
std::optional<int64_t> pixel_step(int64_t n, int64_t h, int64_t w, const Strides& strides);
std::optional<int64_t> pixel_step(const ConvArgs& args);

}  // namespace fused_cna
