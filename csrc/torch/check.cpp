#include "torch/check.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>

#include "torch/overlap.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

// Calls the Python checks, which raise.
[[noreturn]] void refuse(const Inputs& in, const Tensor* out) {
    torch::jit::Stack stack;
    torch::jit::push(stack, in.x, in.weight, in.bias, in.norm_weight, in.norm_bias, in.running_mean, in.running_var, in.eps,
                     in.stride, in.padding, in.dilation, in.groups, std::string(in.act), in.act_params, in.residual,
                     std::string(in.residual_order), out ? MaybeTensor(*out) : std::nullopt);
    c10::Dispatcher::singleton().findSchemaOrThrow("fused_cna::_refuse", "").callBoxed(stack);
    TORCH_CHECK(false,
                "fused_cna: the kernels refuse this call, and fused_cna/_checks.py knows no reason: please report it");
}

bool all_of(IntArrayRef values, auto condition) { return std::all_of(values.begin(), values.end(), condition); }

bool is_like(const Tensor& tensor, const Tensor& x) {
    return tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type();
}

bool is_vector(const MaybeTensor& vector, int64_t size) {
    return !vector || (vector->dim() == 1 && vector->size(0) == size);
}

// Whether the padded input is at least as large as the dilated filter in one dimension.
bool holds(int64_t size, int64_t padding, int64_t filter, int64_t dilation) {
    int64_t extent = 0;
    return !__builtin_mul_overflow(dilation, filter - 1, &extent) && extent < size + padding;
}

bool has_valid_geometry(const Inputs& in) {
    const auto is_positive = [](int64_t value) { return value > 0; };
    if (in.x.dim() != 4 || in.weight.dim() != 4 || !is_like(in.weight, in.x)) return false;
    if (in.bias && !is_like(*in.bias, in.x)) return false;
    if (in.groups <= 0 || in.stride.size() != 2 || in.dilation.size() != 2) return false;
    if (in.padding.size() != 2 && in.padding.size() != 4) return false;
    if (!all_of(in.padding, [](int64_t value) { return value >= 0 && value <= INT32_MAX; })) return false;
    if (!all_of(in.stride, is_positive) || !all_of(in.dilation, is_positive)) return false;
    const IntArrayRef x = in.x.sizes(), weight = in.weight.sizes();
    if (weight[2] <= 0 || weight[3] <= 0 || weight[0] < in.groups || weight[0] % in.groups != 0) return false;
    if (x[1] != weight[1] * in.groups || !is_vector(in.bias, weight[0])) return false;
    const IntArrayRef pads = in.padding;
    const bool four = pads.size() == 4;
    if (!holds(x[2], pads[0] + pads[four ? 1 : 0], weight[2], in.dilation[0])) return false;
    if (!holds(x[3], pads[four ? 2 : 1] + pads[four ? 3 : 1], weight[3], in.dilation[1])) return false;
    return (x[2] > 0 && x[3] > 0) || x[0] == 0 || x[1] == 0;
}

bool has_valid_norm(const Inputs& in, int64_t channels) {
    if (in.running_mean.has_value() != in.running_var.has_value()) return false;
    if (!in.running_mean) return !in.norm_weight && !in.norm_bias;
    const at::ScalarType type = in.running_mean->scalar_type();
    if (type != at::kFloat && type != in.x.scalar_type()) return false;
    const auto is_valid = [&](const MaybeTensor* vector) {
        return !*vector ||
               (is_vector(*vector, channels) && (*vector)->device() == in.x.device() && (*vector)->scalar_type() == type);
    };
    const auto vectors = {&in.norm_weight, &in.norm_bias, &in.running_mean, &in.running_var};
    return std::all_of(vectors.begin(), vectors.end(), is_valid);
}

std::optional<DType> find_dtype(at::ScalarType type) {
    switch (type) {
        case at::kFloat: return DType::float32;
        case at::kHalf: return DType::float16;
        case at::kBFloat16: return DType::bfloat16;
        default: return std::nullopt;
    }
}

StridedView addresses_of(const Tensor& tensor) {
    const auto as_span = [](IntArrayRef values) { return std::span(values.data(), values.size()); };
    return {.start = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.const_data_ptr())),
            .element_bytes = static_cast<int64_t>(tensor.element_size()),
            .sizes = as_span(tensor.sizes()),
            .strides = as_span(tensor.strides())};
}

bool has_memory_of_its_own(const Inputs& in, const Tensor& out) {
    const StridedView written = addresses_of(out);
    if (overlaps_itself(written) != Overlap::none) return false;
    const auto is_apart = [&](const Tensor& input) { return overlaps(addresses_of(input), written) == Overlap::none; };
    const auto vectors = {&in.bias, &in.norm_weight, &in.norm_bias, &in.running_mean, &in.running_var};
    return is_apart(in.x) && is_apart(in.weight) &&
           std::all_of(vectors.begin(), vectors.end(), [&](const auto* vector) { return !*vector || is_apart(**vector); }) &&
           (!in.residual || is_same_view(addresses_of(*in.residual), written) || is_apart(*in.residual));
}

}  // namespace

CheckedInputs check_inputs(const Inputs& in) {
    const std::optional<DType> dtype = find_dtype(in.x.scalar_type());
    const std::optional<ActivationInfo> activation = find_activation(in.act);
    const std::optional<ResidualOrder> order = find_residual_order(in.residual_order);
    // Like torch, an input without channels gives an output without channels.
    const auto channels = [&] { return in.weight.size(1) == 0 ? 0 : in.weight.size(0); };
    const bool is_valid = has_valid_geometry(in) && has_valid_norm(in, channels()) && dtype && activation && order &&
                          in.act_params.size() == (activation->param.empty() ? 0 : 1);
    if (!is_valid) refuse(in, nullptr);
    return {*dtype, activation->value, *order};
}

void check_output(const Inputs& in, const ConvProblem& problem, const Tensor* out) {
    const int64_t size[] = {problem.n, problem.k, problem.p(), problem.q()};
    const auto has_place = [&](const Tensor& tensor) {
        return tensor.sizes() == IntArrayRef(size) && is_like(tensor, in.x);
    };
    const bool is_valid =
        (!in.residual || has_place(*in.residual)) && (!out || (has_place(*out) && has_memory_of_its_own(in, *out)));
    if (!is_valid) refuse(in, out);
}

}  // namespace fused_cna
