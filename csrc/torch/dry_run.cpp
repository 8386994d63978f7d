// The host's work for a call, without a GPU: the operator on CPU tensors without the launch, and the time of each part.
// bench/overhead.py calls both.
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <chrono>
#include <vector>

#include "torch/prepare.h"
#include "torch/signature.h"

namespace fused_cna {

namespace {

using at::Tensor;

// An H100 without tensor maps, because there is no driver to encode them: implicit_gemm_sm90 gathers instead.
const DeviceInfo& device() {
    static const DeviceInfo info = [] {
        DeviceInfo h100 = find_device("H100");
        h100.has_tensor_maps = false;
        return h100;
    }();
    return info;
}

void launch_dry(const Inputs& in, const PreparedCall& call, const Plan& plan) {
    if (plan.kernel != Kernel::cudnn) launch_plan(call.args, plan, in, {.is_dry = true});
}

Tensor dry_run(const Inputs& in) {
    const PreparedCall call = prepare(in, nullptr);
    if (call.y.numel() > 0) launch_dry(in, call, memoised_plan(call.args.problem, device()));
    return call.y;
}

double seconds_each(int64_t repeats, auto work) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / static_cast<double>(repeats);
}

// Seconds for checks, arguments, allocation, plan, and launch preparation.
Tensor host_stages(const Inputs& in, int64_t repeats) {
    TORCH_CHECK(repeats > 0, "repeats should be positive, but got ", repeats);
    PreparedCall call = prepare(in, nullptr);
    const Plan plan = memoised_plan(call.args.problem, device());
    const std::vector<double> seconds{
        seconds_each(repeats, [&] { check_output(in, call.args.problem, nullptr), check_inputs(in); }),
        seconds_each(repeats, [&] { call.args = make_args(in, call.checked), complete_args(in, call); }),
        seconds_each(repeats, [&] { allocate_output(in, call.args.problem); }),
        seconds_each(repeats, [&] { memoised_plan(call.args.problem, device()); }),
        seconds_each(repeats, [&] { launch_dry(in, call, plan); }),
    };
    return at::tensor(seconds, at::kDouble);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_cna, m) {
    m.def(("_dry_run(" + arguments + ") -> Tensor").c_str());
    m.def(("_host_stages(" + arguments + ", int repeats) -> Tensor").c_str(),
          torch::dispatch(c10::DispatchKey::CPU, as_operator<host_stages, int64_t>));
}

TORCH_LIBRARY_IMPL(fused_cna, CPU, m) { m.impl("_dry_run", as_operator<dry_run>); }

}  // namespace fused_cna
