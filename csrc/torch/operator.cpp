// Where torch meets the kernels: check, allocate, fill arguments, device guard, current stream, plan, run.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "args.h"
#include "kernels/run.h"
#include "plan/layout.h"
#include "plan/plan.h"
#include "plan/tuned.h"
#include "torch/check.h"
#include "torch/cudnn.h"
#include "torch/device.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

TensorView view_of(const Tensor& t) {
    return {t.const_data_ptr(),
            {t.size(0), t.size(1), t.size(2), t.size(3)},
            {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

std::array<int64_t, 4> all_pads(IntArrayRef padding) {
    if (padding.size() == 4) return {padding[0], padding[1], padding[2], padding[3]};
    return {padding[0], padding[0], padding[1], padding[1]};
}

// PyTorch's own switch; it has no other.
bool allows_tf32() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV) == at::Float32Precision::TF32;
}

// A call whose arguments passed every check, with memory for its output. Owns what the kernel's pointers refer to.
struct PreparedCall {
    CheckedInputs checked;
    bool y_is_given = false;  // by the caller, who keeps it
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
        .activation = {checked.activation, in.act_params.empty() ? 0.0f : static_cast<float>(in.act_params[0])},
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

// The output goes to `out`, or to memory of its own where that is null.
PreparedCall prepare(const Inputs& in, const Tensor* out) {
    PreparedCall call{.checked = check_inputs(in), .y_is_given = out != nullptr};
    call.args = make_args({
        .x = view_of(in.x),
        .weight = view_of(in.weight),
        .stride = {in.stride[0], in.stride[1]},
        .padding = all_pads(in.padding),
        .dilation = {in.dilation[0], in.dilation[1]},
        .groups = in.groups,
        .dtype = call.checked.dtype,
        .allow_tf32 = allows_tf32(),
        .has_norm = in.running_mean.has_value(),
        .activation = call.checked.activation,
        .residual = in.residual ? std::optional(call.checked.residual_order) : std::nullopt,
    });
    ConvArgs& args = call.args;
    check_output(in, args.problem, out);
    if (in.residual) {
        args.residual = in.residual->const_data_ptr();
        args.residual_strides = as_strides(view_of(*in.residual).strides);
    }
    call.y = out ? *out : allocate_output(in, args.problem);
    args.y = call.y.mutable_data_ptr();
    args.y_strides = as_strides(view_of(call.y).strides);
    args.epilogue = make_epilogue(in, call.checked, call.vectors);
    return call;
}

// A dense channels_last copy, which owns its alignment; contiguous() would return a tensor that is dense but misaligned.
Tensor dense_copy(const Tensor& tensor) { return tensor.clone(at::MemoryFormat::ChannelsLast); }

// Runs a plan with the copies and the workspace that it asks for. They are freed on return, which is safe: the caching
// allocator reuses memory in stream order.
void launch_plan(ConvArgs args, const Plan& plan, const DeviceInfo& device, const Inputs& in) {
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
    run(args, plan, {.handle = c10::cuda::getCurrentCUDAStream(), .starts_early = launches_start_early(device)});
}

bool same_steps(const Tensor& a, const Tensor& b) {
    for (int64_t i = 0; i < a.dim(); ++i) {
        if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
    }
    return true;
}

// cuDNN chooses the output's memory and format; where these are not the operator's, it is copied.
void compute_by_cudnn(const Inputs& in, PreparedCall& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = conv_norm_act_by_cudnn(in, call.checked);
    if (!call.y_is_given && same_steps(y, call.y)) {
        call.y = y.as_strided(call.y.sizes(), call.y.strides());
    } else {
        call.y.copy_(y);
    }
}

void execute(const Inputs& in, const Plan& plan, const DeviceInfo& device, PreparedCall& call) {
    if (plan.kernel == Kernel::cudnn) return compute_by_cudnn(in, call);
    launch_plan(call.args, plan, device, in);
}

void choose_and_execute(const Inputs& in, PreparedCall& call) {
    if (call.y.numel() == 0) return;
    const c10::cuda::CUDAGuard guard(in.x.device());
    const DeviceInfo& device = device_info(in.x.device().index());
    load_tuned_plans_once(in.x.device().index());
    const Plan plan = memoised_plan(call.args.problem, device);
    try {
        execute(in, plan, device, call);
    } catch (const c10::OutOfMemoryError&) {
        // a forced plan is not replaced by another
        if (!plan.allocates() || is_plan_forced()) throw;
        launch_plan(call.args, choose_plan_without_memory(call.args.problem, device), device, in);
    }
}

Tensor conv_norm_act_cuda(const Inputs& in) {
    PreparedCall call = prepare(in, nullptr);
    choose_and_execute(in, call);
    return call.y;
}

void conv_norm_act_out_cuda(const Inputs& in, const Tensor& out) {
    PreparedCall call = prepare(in, &out);
    // Autograd then knows that what it may have saved of this memory is gone. Throws for an inference tensor outside of
    // inference mode.
    out.unsafeGetTensorImpl()->bump_version();
    choose_and_execute(in, call);
}

// Gives a function of Inputs, and of an output to write to where there is one, the operator's signature.
template <auto function, class... Out>
auto as_operator(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                 const MaybeTensor& norm_bias, const MaybeTensor& running_mean, const MaybeTensor& running_var, double eps,
                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view act,
                 at::ArrayRef<double> act_params, const MaybeTensor& residual, std::string_view residual_order, Out... out) {
    return function({x, weight, bias, norm_weight, norm_bias, running_mean, running_var, eps, stride, padding, dilation,
                     groups, act, act_params, residual, residual_order},
                    out...);
}

Tensor checked_output(const Inputs& in) { return prepare(in, nullptr).y; }

void check_with_out(const Inputs& in, const Tensor& out) { prepare(in, &out); }

// The arguments of conv_norm_act; its schema is written in fused_cna/ops.py, so that it exists without this extension.
const std::string arguments =
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, "
    "Tensor? running_var, float eps, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act, "
    "float[] act_params, Tensor? residual, str residual_order";

Tensor by_cudnn_route(const Inputs& in) {
    PreparedCall call = prepare(in, nullptr);
    if (call.y.numel() > 0) compute_by_cudnn(in, call);
    return call.y;
}

// By number, in the order of fields.h.
Tensor problem_fields(const Inputs& in) {
    const ConvProblem problem = prepare(in, nullptr).args.problem;
    std::vector<int64_t> values;
    for_each_problem_field(problem, [&](const char*, const auto& value) { values.push_back(static_cast<int64_t>(value)); });
    return at::tensor(values, at::kLong);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_cna, CUDA, m) {
    m.impl("conv_norm_act", as_operator<conv_norm_act_cuda>);
    m.impl("conv_norm_act_out", as_operator<conv_norm_act_out_cuda, const Tensor&>);
}

// Parts of both operators without their kernels, for tensors of any device: a machine without a GPU compares the checks and
// the output with the Python ones, the cuDNN route with the formula, and the problem with the one that tuning records.
TORCH_LIBRARY_FRAGMENT(fused_cna, m) {
    const auto define = [&](const std::string& name, const std::string& signature, auto* function) {
        m.def((name + "(" + arguments + signature).c_str(),
              torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
    };
    define("_checked_output", ") -> Tensor", as_operator<checked_output>);
    define("_check_out", ", Tensor out) -> ()", as_operator<check_with_out, const Tensor&>);
    define("_cudnn_route", ") -> Tensor", as_operator<by_cudnn_route>);
    define("_problem", ") -> Tensor", as_operator<problem_fields>);
}

}  // namespace fused_cna
