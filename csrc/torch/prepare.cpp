#include "torch/prepare.h"

#include <ATen/Context.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "kernels/run.h"
#include "plan/layout.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

TensorView view_of(const Tensor& t) {
    return {t.const_data_ptr(),
            {t.size(0), t.size(1), t.size(2), t.size(3)},
            {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// PyTorch's own switch; the project adds none.
bool allows_tf32() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV) == at::Float32Precision::TF32;
}

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
        .activation = {checked.activation, in.act_params.empty() ? 0.0f : static_cast<float>(in.act_params[0])},
        .residual_order = checked.residual_order,
    };
}

// A dense channels_last copy with fresh, aligned memory; contiguous() would return a dense but misaligned tensor as it is.
Tensor dense_copy(const Tensor& tensor) { return tensor.clone(at::MemoryFormat::ChannelsLast); }

}  // namespace

std::array<int64_t, 4> all_pads(IntArrayRef padding) {
    if (padding.size() == 4) return {padding[0], padding[1], padding[2], padding[3]};
    return {padding[0], padding[0], padding[1], padding[1]};
}

ConvArgs make_args(const Inputs& in, const CheckedInputs& checked) {
    return make_args({
        .x = view_of(in.x),
        .weight = view_of(in.weight),
        .stride = {in.stride[0], in.stride[1]},
        .padding = all_pads(in.padding),
        .dilation = {in.dilation[0], in.dilation[1]},
        .groups = in.groups,
        .dtype = checked.dtype,
        .allow_tf32 = checked.dtype == DType::float32 && allows_tf32(),
        .has_norm = in.running_mean.has_value(),
        .activation = checked.activation,
        .residual = in.residual ? std::optional(checked.residual_order) : std::nullopt,
    });
}

// The memory format of torch's conv2d. A plain 1x1 weight is channels_last contiguous too, so is_contiguous cannot tell.
Tensor allocate_output(const Inputs& in, const ConvProblem& problem) {
    const bool channels_last = problem.n != 0 && (in.x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                                                  in.weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return at::empty({problem.n, problem.k, problem.p(), problem.q()}, in.x.options().memory_format(format));
}

void complete_args(const Inputs& in, PreparedCall& call) {
    ConvArgs& args = call.args;
    if (in.residual) {
        args.residual = in.residual->const_data_ptr();
        args.residual_strides = as_strides(view_of(*in.residual).strides);
    }
    args.y = call.y.mutable_data_ptr();
    args.y_strides = as_strides(view_of(call.y).strides);
    args.epilogue = make_epilogue(in, call.checked, call.vectors);
}

PreparedCall prepare(const Inputs& in, const Tensor* out) {
    PreparedCall call{.checked = check_inputs(in), .y_is_given = out != nullptr};
    call.args = make_args(in, call.checked);
    check_output(in, call.args.problem, out);
    call.y = out ? *out : allocate_output(in, call.args.problem);
    complete_args(in, call);
    return call;
}

void launch_plan(ConvArgs args, const Plan& plan, const Inputs& in, Stream stream) {
    Tensor x, weight, workspace;
    if (plan.convert_x) {
        x = dense_copy(in.x);
        args.x = x.const_data_ptr();
        args.x_strides = as_strides(view_of(x).strides);
    }
    if (plan.convert_weight) {
        weight = dense_copy(in.weight);
        args.weight = weight.const_data_ptr();
        args.weight_strides = as_filter_strides(view_of(weight).strides);
    }
    if (plan.workspace_bytes > 0) {
        workspace = at::empty({plan.workspace_bytes / int64_t{sizeof(float)}}, in.x.options().dtype(at::kFloat));
        args.workspace = workspace.mutable_data_ptr<float>();
    }
    run(args, plan, stream);
}

}  // namespace fused_cna
