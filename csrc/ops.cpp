// The one file that includes torch: check, allocate, fill arguments, device guard, current stream, plan, run.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "conv_args.h"
#include "plan.h"
#include "run.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The operator's arguments, by reference, in the order of its schema.
struct Inputs {
    const Tensor& x;
    const Tensor& weight;
    const MaybeTensor& bias;
    const MaybeTensor& norm_weight;
    const MaybeTensor& norm_bias;
    const MaybeTensor& running_mean;
    const MaybeTensor& running_var;
    double eps;
    IntArrayRef stride;
    IntArrayRef padding;
    IntArrayRef dilation;
    int64_t groups;
    std::string_view act;
    at::ArrayRef<double> act_params;
    const MaybeTensor& residual;
    std::string_view residual_order;
};

void check_same_device(const Tensor& x, const Tensor& other, const char* name) {
    TORCH_CHECK(other.device() == x.device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", x.device(), " and ",
                other.device(), "! (", name, " is on ", other.device(), ")");
}

DType storage_dtype(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return DType::float32;
        case at::kHalf: return DType::float16;
        case at::kBFloat16: return DType::bfloat16;
        default:
            TORCH_CHECK(false, "fused_cna::conv_norm_act has CUDA kernels for float32, float16 and bfloat16, but got ",
                        x.scalar_type(), "; convert the input, or call fused_cna.conv_norm_act, which falls back");
    }
}

// Wording and order are those of torch's own conv2d.
void check_convolution(const Inputs& in) {
    const auto xs = in.x.sizes(), ws = in.weight.sizes();
    const int64_t groups = in.groups;
    TORCH_CHECK(xs.size() == 4, "Expected 4D (batched) input to fused_cna::conv_norm_act, but got input of size: ", xs,
                "; give [N, C, H, W]");
    TORCH_CHECK(in.weight.scalar_type() == in.x.scalar_type(), "Input type (", in.x.toString(), ") and weight type (",
                in.weight.toString(), ") should be the same");
    TORCH_CHECK(!in.bias || in.bias->scalar_type() == in.x.scalar_type(), "Input type (", in.x.toString(),
                ") and bias type (", in.bias ? in.bias->toString() : "", ") should be the same");
    TORCH_CHECK(ws.size() == 4, "Expected ", ws.size(), "-dimensional input for ", ws.size(), "-dimensional weight ", ws,
                ", but got 4-dimensional input of size ", xs, " instead");
    const auto check_pair = [](const char* name, IntArrayRef values) {
        TORCH_CHECK(values.size() == 2, "expected ", name,
                    " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ",
                    name, "=", values);
    };
    check_pair("stride", in.stride);
    check_pair("dilation", in.dilation);
    TORCH_CHECK(
        in.padding.size() == 2 || in.padding.size() == 4,
        "expected padding to be 2 values (height, width) or 4 (top, bottom, left, right), but got padding=", in.padding);
    for (const int64_t value : in.padding) TORCH_CHECK(value >= 0, "negative padding is not supported");
    for (const int64_t value : in.stride) TORCH_CHECK(value > 0, "non-positive stride is not supported");
    for (const int64_t value : in.dilation) TORCH_CHECK(value > 0, "dilation should be greater than zero");
    TORCH_CHECK(groups > 0, "non-positive groups is not supported");
    TORCH_CHECK(ws[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
                " at dimension 0, but got weight of size ", ws, " instead");
    TORCH_CHECK(ws[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
                " at dimension 0, but got weight of size [", ws, "] instead");
    TORCH_CHECK(xs[1] == ws[1] * groups, "Given groups=", groups, ", weight of size ", ws, ", expected input", xs,
                " to have ", ws[1] * groups, " channels, but got ", xs[1], " channels instead");
    TORCH_CHECK(!in.bias || (in.bias->dim() == 1 && in.bias->size(0) == ws[0]), "Given weight of size ", ws,
                ", expected bias to be 1-dimensional with ", ws[0], " elements, but got bias of size ",
                in.bias ? in.bias->sizes() : IntArrayRef(), " instead");
}

ConvProblem make_problem(const Inputs& in) {
    const bool four = in.padding.size() == 4;
    const ConvProblem problem{
        .n = in.x.size(0),
        .c = in.x.size(1),
        .h = in.x.size(2),
        .w = in.x.size(3),
        .k = in.weight.size(0),
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
    const int64_t filter_h = problem.dil_h * (problem.r - 1) + 1, filter_w = problem.dil_w * (problem.s - 1) + 1;
    TORCH_CHECK(problem.r > 0 && problem.s > 0 && filter_h <= problem.padded_h() && filter_w <= problem.padded_w(),
                "Calculated padded input size per channel: (", problem.padded_h(), " x ", problem.padded_w(),
                "). Kernel size: (", filter_h, " x ", filter_w, "). Kernel size can't be greater than actual input size");
    return problem;
}

void check_norm(const Inputs& in, int64_t channels) {
    TORCH_CHECK(in.running_mean.has_value() == in.running_var.has_value(),
                "running_mean and running_var are given together or not at all, but only ",
                in.running_mean ? "running_mean" : "running_var", " was given");
    TORCH_CHECK(in.running_mean || (!in.norm_weight && !in.norm_bias), in.norm_weight ? "norm_weight" : "norm_bias",
                " was given without running_mean and running_var; give both, or no norm vector at all");
    const std::pair<const char*, const MaybeTensor*> vectors[] = {{"norm_weight", &in.norm_weight},
                                                                  {"norm_bias", &in.norm_bias},
                                                                  {"running_mean", &in.running_mean},
                                                                  {"running_var", &in.running_var}};
    for (const auto& [name, vector] : vectors) {
        if (!vector->has_value()) continue;
        const Tensor& given = **vector;
        check_same_device(in.x, given, name);
        TORCH_CHECK(given.dim() == 1 && given.size(0) == channels, name, " should contain ", channels,
                    " elements in one dimension, but got size ", given.sizes());
        const bool known_dtype = given.scalar_type() == at::kFloat || given.scalar_type() == in.x.scalar_type();
        TORCH_CHECK(known_dtype && given.scalar_type() == in.running_mean->scalar_type(),
                    "the norm vectors should all be Float or all be the input's ", in.x.scalar_type(), ", but ", name,
                    " is ", given.scalar_type(), " and running_mean is ", in.running_mean->scalar_type());
    }
}

ActivationInfo check_activation(const Inputs& in) {
    const std::optional<ActivationInfo> info = find_activation(in.act);
    if (!info) {
        std::string known;
        for (const ActivationInfo& each : activations) known += (known.empty() ? "" : ", ") + std::string(each.name);
        TORCH_CHECK(false, "unknown activation \"", in.act, "\"; known are ", known);
    }
    TORCH_CHECK(static_cast<int64_t>(in.act_params.size()) == info->params, "activation \"", in.act, "\" takes ",
                info->params, " act_params, but got ", in.act_params.size());
    return *info;
}

ResidualOrder check_residual_order(const Inputs& in) {
    const std::optional<ResidualOrder> order = find_residual_order(in.residual_order);
    TORCH_CHECK(order, "residual_order should be \"add_act\" or \"act_add\", but got \"", in.residual_order, "\"");
    return *order;
}

void check_residual(const Tensor& x, const Tensor& residual, IntArrayRef output_size) {
    check_same_device(x, residual, "residual");
    TORCH_CHECK(residual.sizes() == output_size, "residual should have the output's size ", output_size, ", but got size ",
                residual.sizes(), "; it is not broadcast");
    TORCH_CHECK(residual.scalar_type() == x.scalar_type(), "residual should have the input's dtype ", x.scalar_type(),
                ", but got ", residual.scalar_type());
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// A call whose arguments passed every check, with its output allocated. Owns what the kernel's pointers refer to.
struct PreparedCall {
    ConvArgs args;
    Tensor y;
    std::array<Tensor, 5> vectors;  // bias and norm vectors made dense; the same tensors where they already were
};

const void* dense_vector(const MaybeTensor& vector, Tensor& owner) {
    if (!vector) return nullptr;
    owner = vector->contiguous();
    return owner.const_data_ptr();
}

Epilogue make_epilogue(const Inputs& in, std::array<Tensor, 5>& owners) {
    const ActivationInfo activation = check_activation(in);
    return {
        .bias = dense_vector(in.bias, owners[0]),
        .norm_weight = dense_vector(in.norm_weight, owners[1]),
        .norm_bias = dense_vector(in.norm_bias, owners[2]),
        .running_mean = dense_vector(in.running_mean, owners[3]),
        .running_var = dense_vector(in.running_var, owners[4]),
        .eps = static_cast<float>(in.eps),
        .norm_is_float32 = in.running_mean && in.running_mean->scalar_type() == at::kFloat,
        .activation = activation.value,
        .activation_param = activation.params ? static_cast<float>(in.act_params[0]) : 0.0f,
        .residual_order = check_residual_order(in),
    };
}

// What torch's conv2d returns. A plain 1x1 weight is also channels_last contiguous, so contiguity is not asked for.
Tensor allocate_output(const Inputs& in, IntArrayRef size) {
    const bool channels_last = in.x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                               in.weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return at::empty(
        size, in.x.options().memory_format(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

PreparedCall prepare(const Inputs& in) {
    check_same_device(in.x, in.weight, "weight");
    if (in.bias) check_same_device(in.x, *in.bias, "bias");
    check_convolution(in);
    PreparedCall call;
    ConvArgs& args = call.args;
    args.problem = make_problem(in);
    check_norm(in, args.problem.k);
    args.epilogue = make_epilogue(in, call.vectors);
    const int64_t output_size[] = {args.problem.n, args.problem.k, args.problem.p(), args.problem.q()};
    if (in.residual) {
        check_residual(in.x, *in.residual, output_size);
        args.residual = in.residual->const_data_ptr();
        args.residual_strides = strides_of(*in.residual);
    }
    call.y = allocate_output(in, output_size);
    args.x = in.x.const_data_ptr();
    args.x_strides = strides_of(in.x);
    args.weight = in.weight.const_data_ptr();
    args.weight_strides = {in.weight.stride(0), in.weight.stride(1), in.weight.stride(2), in.weight.stride(3)};
    args.y = call.y.mutable_data_ptr();
    args.y_strides = strides_of(call.y);
    return call;
}

int device_attribute(cudaDeviceAttr attribute, c10::DeviceIndex device) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

DeviceInfo device_info(c10::DeviceIndex device) {
    const DeviceInfo info{.compute_major = device_attribute(cudaDevAttrComputeCapabilityMajor, device),
                          .compute_minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device),
                          .multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device)};
    TORCH_CHECK(info.compute_major >= 8, "fused_cna's kernels need compute capability 8.0 or newer, but device ",
                static_cast<int>(device), " has ", info.compute_major, ".", info.compute_minor,
                "; call fused_cna.conv_norm_act, which falls back");
    return info;
}

Tensor conv_norm_act_cuda(const Inputs& in) {
    PreparedCall call = prepare(in);
    if (call.y.numel() == 0) return call.y;
    const c10::cuda::CUDAGuard guard(in.x.device());
    const Plan& plan = memoised_plan(call.args.problem, device_info(in.x.device().index()));
    run(call.args, plan, c10::cuda::getCurrentCUDAStream());
    return call.y;
}

// Gives a function of Inputs the operator's signature.
template <Tensor (*function)(const Inputs&)>
Tensor as_operator(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                   const MaybeTensor& norm_bias, const MaybeTensor& running_mean, const MaybeTensor& running_var, double eps,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view act,
                   at::ArrayRef<double> act_params, const MaybeTensor& residual, std::string_view residual_order) {
    return function({x, weight, bias, norm_weight, norm_bias, running_mean, running_var, eps, stride, padding, dilation,
                     groups, act, act_params, residual, residual_order});
}

Tensor checked_output(const Inputs& in) { return prepare(in).y; }

}  // namespace

// The schema of conv_norm_act is written in fused_cna/ops.py, so that it exists without this extension.
TORCH_LIBRARY_IMPL(fused_cna, CUDA, m) { m.impl("conv_norm_act", as_operator<conv_norm_act_cuda>); }

// The checks and the output of conv_norm_act for tensors of any device, without the kernel: a machine without a GPU
// compares them with the Python ones.
TORCH_LIBRARY_FRAGMENT(fused_cna, m) {
    m.def(
        "_checked_output(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? running_mean, Tensor? running_var, float eps, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
        "SymInt groups, str act, float[] act_params, Tensor? residual, str residual_order) -> Tensor",
        torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, as_operator<checked_output>));
}

}  // namespace fused_cna
