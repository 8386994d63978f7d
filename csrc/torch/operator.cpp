// The operator on CUDA, where torch meets the kernels: check, allocate, fill arguments, device, stream, plan, run.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "plan/plan.h"
#include "plan/tuned.h"
#include "torch/check.h"
#include "torch/cudnn.h"
#include "torch/device.h"
#include "torch/prepare.h"
#include "torch/signature.h"

namespace fused_cna {

namespace {

using at::Tensor;

bool same_steps(const Tensor& a, const Tensor& b) {
    for (int64_t i = 0; i < a.dim(); ++i) {
        if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
    }
    return true;
}

// cuDNN chooses the output's memory and strides; where the operator needs others, the output is copied.
void compute_by_cudnn(const Inputs& in, PreparedCall& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor y = conv_norm_act_by_cudnn(in, call.checked);
    if (!call.y_is_given && same_steps(y, call.y)) {
        call.y = y.as_strided(call.y.sizes(), call.y.strides());
    } else {
        call.y.copy_(y);
    }
}

Stream current_stream(const DeviceInfo& device) {
    return {.handle = c10::cuda::getCurrentCUDAStream(), .starts_early = launches_start_early(device)};
}

void execute(const Inputs& in, const Plan& plan, const DeviceInfo& device, PreparedCall& call) {
    if (plan.kernel == Kernel::cudnn) return compute_by_cudnn(in, call);
    launch_plan(call.args, plan, in, current_stream(device));
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
        launch_plan(call.args, choose_plan_without_memory(call.args.problem, device), in, current_stream(device));
    }
}

Tensor conv_norm_act_cuda(const Inputs& in) {
    PreparedCall call = prepare(in, nullptr);
    choose_and_execute(in, call);
    return call.y;
}

void conv_norm_act_out_cuda(const Inputs& in, const Tensor& out) {
    PreparedCall call = prepare(in, &out);
    // Tells autograd that anything it saved of this memory is gone. Throws for an inference tensor outside inference mode.
    out.unsafeGetTensorImpl()->bump_version();
    choose_and_execute(in, call);
}

Tensor checked_output(const Inputs& in) { return prepare(in, nullptr).y; }

void check_with_out(const Inputs& in, const Tensor& out) { prepare(in, &out); }

Tensor by_cudnn_route(const Inputs& in) {
    PreparedCall call = prepare(in, nullptr);
    if (call.y.numel() > 0) compute_by_cudnn(in, call);
    return call.y;
}

// The values of for_each_problem_field, in its order.
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

// Parts of both operators without their kernels, for tensors on any device. Tests on a machine without a GPU compare the
// checks and the output with Python's, the cuDNN route with the formula, and the problem with the one that tuning records.
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
