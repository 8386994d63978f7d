// Where torch meets the kernels: check, allocate, fill arguments, device guard, current stream, plan, run.
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

#include "checks.h"
#include "conv_args.h"
#include "plan.h"
#include "run.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

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

Epilogue make_epilogue(const Inputs& in, const CheckedInputs& checked, std::array<Tensor, 5>& owners) {
    return {
        .bias = dense_vector(in.bias, owners[0]),
        .norm_weight = dense_vector(in.norm_weight, owners[1]),
        .norm_bias = dense_vector(in.norm_bias, owners[2]),
        .running_mean = dense_vector(in.running_mean, owners[3]),
        .running_var = dense_vector(in.running_var, owners[4]),
        .eps = static_cast<float>(in.eps),
        .norm_is_float32 = in.running_mean && in.running_mean->scalar_type() == at::kFloat,
        .activation = checked.activation.value,
        .activation_param = in.act_params.empty() ? 0.0f : static_cast<float>(in.act_params[0]),
        .residual_order = checked.residual_order,
    };
}

// What torch's conv2d returns. A plain 1x1 weight is also channels_last contiguous, so contiguity is not asked for.
Tensor allocate_output(const Inputs& in, const ConvProblem& problem) {
    const bool channels_last = problem.n != 0 && (in.x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                                                  in.weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return at::empty({problem.n, problem.k, problem.p(), problem.q()}, in.x.options().memory_format(format));
}

PreparedCall prepare(const Inputs& in) {
    const CheckedInputs checked = check_inputs(in);
    PreparedCall call;
    call.y = allocate_output(in, checked.problem);
    ConvArgs& args = call.args;
    args.problem = checked.problem;
    args.x = in.x.const_data_ptr();
    args.x_strides = strides_of(in.x);
    args.weight = in.weight.const_data_ptr();
    args.weight_strides = {in.weight.stride(0), in.weight.stride(1), in.weight.stride(2), in.weight.stride(3)};
    if (in.residual) {
        args.residual = in.residual->const_data_ptr();
        args.residual_strides = strides_of(*in.residual);
    }
    args.y = call.y.mutable_data_ptr();
    args.y_strides = strides_of(call.y);
    args.epilogue = make_epilogue(in, checked, call.vectors);
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
    const Plan plan = memoised_plan(call.args.problem, device_info(in.x.device().index()));
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
