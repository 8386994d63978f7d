#include "checks.h"

#include <array>
#include <cstdlib>
#include <span>
#include <string>
#include <utility>

#include "overlap.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

// The names that Python has for them.
std::string name_of(at::ScalarType type) {
    switch (type) {
        case at::kFloat: return "torch.float32";
        case at::kDouble: return "torch.float64";
        case at::kHalf: return "torch.float16";
        case at::kBFloat16: return "torch.bfloat16";
        default: return toString(type);
    }
}

void check_device(const Tensor& tensor, const char* name, const Tensor& x) {
    TORCH_CHECK(tensor.device() == x.device(), "Expected all tensors to be on the same device, but got ", name, " is on ",
                tensor.device(), ", different from other tensors on ", x.device());
}

void check_dimensions(const Inputs& in) {
    const IntArrayRef x = in.x.sizes(), weight = in.weight.sizes();
    TORCH_CHECK(x.size() == 4, "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", x,
                "; the operator takes [N, C, H, W], fused_cna.conv_norm_act takes [C, H, W] too");
    TORCH_CHECK(weight.size() >= 3, "weight should have at least three dimensions, but got size ", weight);
    TORCH_CHECK(weight.size() == 4, "Expected ", weight.size(), "-dimensional input for ", weight.size(),
                "-dimensional weight ", weight, ", but got 4-dimensional input of size ", x, " instead");
}

void check_types(const Inputs& in) {
    const auto check = [&](const Tensor& tensor, const char* name) {
        TORCH_CHECK(tensor.device().type() == in.x.device().type(), "Input type (", in.x.toString(), ") and ", name,
                    " type (", tensor.toString(), ") should be the same, but ", name, " is on ", tensor.device());
        check_device(tensor, name, in.x);
        TORCH_CHECK(tensor.scalar_type() == in.x.scalar_type(), "Input type (", in.x.toString(), ") and ", name, " type (",
                    tensor.toString(), ") should be the same");
    };
    if (in.bias) check(*in.bias, "bias");
    check(in.weight, "weight");
}

void check_geometry(const Inputs& in) {
    TORCH_CHECK(in.groups > 0, "non-positive groups is not supported, but got groups=", in.groups);
    const auto check_count = [](const char* name, IntArrayRef values, bool or_four) {
        TORCH_CHECK(values.size() == 2 || (or_four && values.size() == 4), "expected ", name,
                    " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ",
                    name, "=", values, or_four ? "; 4 values would be (top, bottom, left, right)" : "");
    };
    check_count("stride", in.stride, false);
    check_count("padding", in.padding, true);
    check_count("dilation", in.dilation, false);
    for (const int64_t value : in.padding) {
        TORCH_CHECK(value >= 0, "negative padding is not supported, but got padding=", in.padding);
        TORCH_CHECK(value <= INT32_MAX, "padding should be at most ", INT32_MAX, ", but got padding=", in.padding);
    }
    for (const int64_t value : in.stride) {
        TORCH_CHECK(value > 0, "non-positive stride is not supported, but got stride=", in.stride);
    }
    for (const int64_t value : in.dilation) {
        TORCH_CHECK(value > 0, "dilation should be greater than zero (non-positive dilation is not supported), but got ",
                    "dilation=", in.dilation);
    }
}

void check_channels(const Inputs& in) {
    const IntArrayRef x = in.x.sizes(), weight = in.weight.sizes();
    TORCH_CHECK(weight[2] > 0 && weight[3] > 0,
                "the filter should have at least one row and column, but got weight of size ", weight);
    TORCH_CHECK(weight[0] >= in.groups, "Given groups=", in.groups, ", expected weight to be at least ", in.groups,
                " at dimension 0, but got weight of size ", weight, " instead");
    TORCH_CHECK(weight[0] % in.groups == 0, "Given groups=", in.groups, ", expected weight to be divisible by ", in.groups,
                " at dimension 0, but got weight of size [", weight, "] instead");
    TORCH_CHECK(x[1] == weight[1] * in.groups, "Given groups=", in.groups, ", weight of size ", weight, ", expected input",
                x, " to have ", weight[1] * in.groups, " channels, but got ", x[1], " channels instead");
    TORCH_CHECK(!in.bias || (in.bias->dim() == 1 && in.bias->size(0) == weight[0]), "Given weight of size ", weight,
                ", expected bias to be 1-dimensional with ", weight[0], " elements, but got bias of size ",
                in.bias ? in.bias->sizes() : IntArrayRef(), " instead");
}

DType storage_dtype(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return DType::float32;
        case at::kHalf: return DType::float16;
        case at::kBFloat16: return DType::bfloat16;
        default:
            TORCH_CHECK(false, "no kernel takes ", name_of(x.scalar_type()),
                        "; there are kernels for float32, float16 and bfloat16. Convert the input, or call "
                        "fused_cna.conv_norm_act, which falls back to eager PyTorch");
    }
}

// dilation * (size - 1) + 1, or the largest number where that overflows.
int64_t filter_extent(int64_t size, int64_t dilation) {
    int64_t extent = 0;
    const bool overflows = __builtin_mul_overflow(dilation, size - 1, &extent) || __builtin_add_overflow(extent, 1, &extent);
    return overflows ? INT64_MAX : extent;
}

ConvProblem make_problem(const Inputs& in) {
    const bool four = in.padding.size() == 4;
    const ConvProblem problem{
        .n = in.x.size(0),
        .c = in.x.size(1),
        .h = in.x.size(2),
        .w = in.x.size(3),
        // torch gives an input without channels an output without channels.
        .k = in.weight.size(1) == 0 ? 0 : in.weight.size(0),
        .r = in.weight.size(2),
        .s = in.weight.size(3),
        .stride_h = in.stride[0],
        .stride_w = in.stride[1],
        .pad_top = in.padding[0],
        .pad_bottom = in.padding[four ? 1 : 0],
        .pad_left = in.padding[four ? 2 : 1],
        .pad_right = in.padding[four ? 3 : 1],
        .dil_h = in.dilation[0],
        .dil_w = in.dilation[1],
        .groups = in.groups,
        .dtype = storage_dtype(in.x),
    };
    const int64_t filter_h = filter_extent(problem.r, problem.dil_h), filter_w = filter_extent(problem.s, problem.dil_w);
    TORCH_CHECK(filter_h <= problem.padded_h() && filter_w <= problem.padded_w(),
                "Calculated padded input size per channel: (", problem.padded_h(), " x ", problem.padded_w(),
                "). Kernel size: (", filter_h, " x ", filter_w, "). Kernel size can't be greater than actual input size");
    const bool empty_image = problem.h == 0 || problem.w == 0;
    TORCH_CHECK(!empty_image || problem.n == 0 || problem.c == 0,
                "Only zero batch or zero channel inputs are supported, but got input shape: ", in.x.sizes());
    return problem;
}

void check_norm(const Inputs& in, int64_t channels) {
    const std::array<std::pair<const char*, const MaybeTensor*>, 4> vectors{{{"norm_weight", &in.norm_weight},
                                                                             {"norm_bias", &in.norm_bias},
                                                                             {"running_mean", &in.running_mean},
                                                                             {"running_var", &in.running_var}}};
    const auto list_given = [&](bool with_dtypes) {
        std::string text;
        for (const auto& [name, vector] : vectors) {
            if (!vector->has_value()) continue;
            text += (text.empty() ? "" : ", ") + std::string(name);
            if (with_dtypes) text += ": " + name_of((*vector)->scalar_type());
        }
        return text;
    };
    const bool any = in.norm_weight || in.norm_bias || in.running_mean || in.running_var;
    TORCH_CHECK(!any || (in.running_mean && in.running_var),
                "running_mean and running_var must both be given for a norm, and both be None without one, but of the norm "
                "vectors only ",
                list_given(false), " were given");
    for (const auto& [name, vector] : vectors) {
        if (!vector->has_value()) continue;
        const Tensor& given = **vector;
        check_device(given, name, in.x);
        TORCH_CHECK(given.dim() == 1 && given.size(0) == channels, name, " should contain ", channels,
                    " elements, one per output channel, but got ", name, " of size ", given.sizes());
    }
    for (const auto& [name, vector] : vectors) {
        if (!vector->has_value()) continue;
        const at::ScalarType type = (*vector)->scalar_type();
        TORCH_CHECK((type == at::kFloat || type == in.x.scalar_type()) && type == in.running_mean->scalar_type(),
                    "the norm vectors should all be torch.float32 or all have the input's ", name_of(in.x.scalar_type()),
                    ", but got ", list_given(true));
    }
}

ActivationInfo check_activation(const Inputs& in) {
    const std::optional<ActivationInfo> info = find_activation(in.act);
    if (!info) {
        std::string known;
        for (const ActivationInfo& each : activations) known += (known.empty() ? "" : ", ") + std::string(each.name);
        TORCH_CHECK(false, "unknown activation '", in.act, "'; known are ", known);
    }
    const size_t expected = info->param.empty() ? 0 : 1;
    TORCH_CHECK(in.act_params.size() == expected, "activation '", in.act, "' takes ",
                expected ? "1 act_params (" + std::string(info->param) + ")" : "no act_params", ", but got ", in.act_params);
    return *info;
}

ResidualOrder check_residual_order(const Inputs& in) {
    const std::optional<ResidualOrder> order = find_residual_order(in.residual_order);
    TORCH_CHECK(order, "unknown residual_order '", in.residual_order, "'; known are add_act, act_add");
    return *order;
}

void check_residual(const Inputs& in, const ConvProblem& problem) {
    const Tensor& residual = *in.residual;
    const int64_t output_size[] = {problem.n, problem.k, problem.p(), problem.q()};
    TORCH_CHECK(residual.sizes() == IntArrayRef(output_size), "residual should have the output's size ",
                IntArrayRef(output_size), ", but got residual of size ", residual.sizes());
    TORCH_CHECK(residual.scalar_type() == in.x.scalar_type(), "residual should have the output's dtype ",
                name_of(in.x.scalar_type()), ", but got residual of dtype ", name_of(residual.scalar_type()));
    check_device(residual, "residual", in.x);
}

std::span<const int64_t> as_span(IntArrayRef values) { return {values.data(), values.size()}; }

StridedView view_of(const Tensor& tensor) {
    return {.start = static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.const_data_ptr())),
            .element_bytes = static_cast<int64_t>(tensor.element_size()),
            .sizes = as_span(tensor.sizes()),
            .strides = as_span(tensor.strides())};
}

void check_no_overlap(const Tensor& input, const char* name, const char* way_out, const Tensor& out) {
    const StridedView read = view_of(input), written = view_of(out);
    const Overlap shared = overlaps(read, written);
    if (shared == Overlap::none) return;
    const int64_t distance = written.start - read.start;
    TORCH_CHECK(false, "unsupported operation: some elements of the input tensor ", name, " and the written-to tensor ",
                shared == Overlap::some ? "refer" : "may refer", " to a single memory location: ", name, " has size ",
                input.sizes(), " and strides ", input.strides(), ", out starts ", std::abs(distance), " bytes ",
                distance < 0 ? "before" : "behind", " it and has size ", out.sizes(), " and strides ", out.strides(),
                ". Please clone() ", name, " before performing the operation", way_out);
}

void check_out_memory(const Inputs& in, const Tensor& out) {
    const Overlap itself = overlaps_itself(view_of(out));
    TORCH_CHECK(itself == Overlap::none, "unsupported operation: more than one element of the written-to tensor ",
                itself == Overlap::some ? "refers" : "may refer", " to a single memory location: out has size ", out.sizes(),
                " and strides ", out.strides(), ". Give every element of out a place of its own");
    check_no_overlap(in.x, "x", "", out);
    check_no_overlap(in.weight, "weight", "", out);
    const std::array<std::pair<const char*, const MaybeTensor*>, 5> vectors{{{"bias", &in.bias},
                                                                             {"norm_weight", &in.norm_weight},
                                                                             {"norm_bias", &in.norm_bias},
                                                                             {"running_mean", &in.running_mean},
                                                                             {"running_var", &in.running_var}}};
    for (const auto& [name, vector] : vectors) {
        if (vector->has_value()) check_no_overlap(**vector, name, "", out);
    }
    if (in.residual && !is_same_view(view_of(*in.residual), view_of(out))) {
        check_no_overlap(*in.residual, "residual", ", or pass out itself as residual", out);
    }
}

}  // namespace

CheckedInputs check_inputs(const Inputs& in) {
    check_dimensions(in);
    check_types(in);
    check_geometry(in);
    check_channels(in);
    const ConvProblem problem = make_problem(in);
    check_norm(in, problem.k);
    const CheckedInputs checked{problem, check_activation(in), check_residual_order(in)};
    if (in.residual) check_residual(in, problem);
    return checked;
}

void check_out(const Inputs& in, const ConvProblem& problem, const Tensor& out) {
    const int64_t output_size[] = {problem.n, problem.k, problem.p(), problem.q()};
    TORCH_CHECK(out.sizes() == IntArrayRef(output_size), "out should have the output's size ", IntArrayRef(output_size),
                ", but got out of size ", out.sizes());
    TORCH_CHECK(out.scalar_type() == in.x.scalar_type(), "out should have the output's dtype ", name_of(in.x.scalar_type()),
                ", which under autocast is that of autocast, but got out of dtype ", name_of(out.scalar_type()));
    check_device(out, "out", in.x);
    check_out_memory(in, out);
}

}  // namespace fused_cna
