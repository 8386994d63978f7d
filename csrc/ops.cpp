// Where torch meets the kernels: check, allocate, fill arguments, device guard, current stream, plan, run.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "checks.h"
#include "conv_args.h"
#include "layout.h"
#include "plan.h"
#include "run.h"

namespace fused_cna {

namespace {

using at::IntArrayRef;
using at::Tensor;

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
FilterStrides filter_strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// PyTorch's own switch; it has no other.
bool allows_tf32() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV) == at::Float32Precision::TF32;
}

// A call whose arguments passed every check, with memory for its output. Owns what the kernel's pointers refer to.
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

// The output goes to `out`, or to memory of its own where that is null.
PreparedCall prepare(const Inputs& in, const Tensor* out) {
    const CheckedInputs checked = check_inputs(in);
    if (out) check_out(in, checked.problem, *out);
    PreparedCall call;
    call.y = out ? *out : allocate_output(in, checked.problem);
    ConvArgs& args = call.args;
    args.problem = checked.problem;
    args.x = in.x.const_data_ptr();
    args.x_strides = strides_of(in.x);
    args.weight = in.weight.const_data_ptr();
    args.weight_strides = filter_strides_of(in.weight);
    if (in.residual) {
        args.residual = in.residual->const_data_ptr();
        args.residual_strides = strides_of(*in.residual);
    }
    args.y = call.y.mutable_data_ptr();
    args.y_strides = strides_of(call.y);
    args.epilogue = make_epilogue(in, checked, call.vectors);
    args.problem.allow_tf32 = args.problem.dtype == DType::float32 && allows_tf32();
    describe_layout(args);
    return call;
}

int device_attribute(cudaDeviceAttr attribute, c10::DeviceIndex device) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

DeviceInfo read_device_info(c10::DeviceIndex device) {
    const auto get = [&](cudaDeviceAttr attribute) { return device_attribute(attribute, device); };
    // Virtualised and integrated devices may report a clock of 0; any plausible one orders the plans better than infinity.
    const DeviceInfo& fallback = named_devices.front().info;
    const auto known = [](double reported, double otherwise) { return reported > 0 ? reported : otherwise; };
    const double memory_clock_hz = get(cudaDevAttrMemoryClockRate) * 1e3;  // two transfers a clock
    const DeviceInfo info{
        .compute_major = get(cudaDevAttrComputeCapabilityMajor),
        .compute_minor = get(cudaDevAttrComputeCapabilityMinor),
        .multiprocessors = get(cudaDevAttrMultiProcessorCount),
        .shared_per_multiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        .shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .clock_ghz = known(get(cudaDevAttrClockRate) * 1e-6, fallback.clock_ghz),
        .bandwidth_gbs =
            known(2 * memory_clock_hz * get(cudaDevAttrGlobalMemoryBusWidth) / 8 * 1e-9, fallback.bandwidth_gbs),
    };
    TORCH_CHECK(info.compute_major >= 8, "fused_cna's kernels need compute capability 8.0 or newer, but device ",
                static_cast<int>(device), " has ", info.compute_major, ".", info.compute_minor,
                "; call fused_cna.conv_norm_act, which falls back");
    return info;
}

// Read once per device: the attributes do not change, and asking for the clocks is slow.
const DeviceInfo& device_info(c10::DeviceIndex device) {
    static std::mutex mutex;
    static std::map<c10::DeviceIndex, DeviceInfo> infos;
    const std::lock_guard lock(mutex);
    const auto found = infos.find(device);
    return found != infos.end() ? found->second : infos.emplace(device, read_device_info(device)).first->second;
}

// A dense channels_last copy, which owns its alignment; contiguous() would return a tensor that is dense but misaligned.
Tensor dense_copy(const Tensor& tensor) { return tensor.clone(at::MemoryFormat::ChannelsLast); }

// Runs a plan with the copies and the workspace that it asks for. They are freed on return, which is safe: the caching
// allocator reuses memory in stream order.
void run_plan(ConvArgs args, const Plan& plan, const Inputs& in) {
    Tensor x, weight, workspace;
    if (plan.convert_x) {
        x = dense_copy(in.x);
        args.x = x.const_data_ptr();
        args.x_strides = strides_of(x);
    }
    if (plan.convert_weight) {
        weight = dense_copy(in.weight);
        args.weight = weight.const_data_ptr();
        args.weight_strides = filter_strides_of(weight);
    }
    if (plan.workspace_bytes > 0) {
        workspace = at::empty({plan.workspace_bytes / int64_t{sizeof(float)}}, in.x.options().dtype(at::kFloat));
        args.workspace = workspace.mutable_data_ptr<float>();
    }
    run(args, plan, c10::cuda::getCurrentCUDAStream());
}

void launch(const PreparedCall& call, const Inputs& in) {
    if (call.y.numel() == 0) return;
    const c10::cuda::CUDAGuard guard(in.x.device());
    const DeviceInfo& device = device_info(in.x.device().index());
    const Plan plan = memoised_plan(call.args.problem, device);
    try {
        run_plan(call.args, plan, in);
    } catch (const c10::OutOfMemoryError&) {
        if (!plan.allocates()) throw;
        run_plan(call.args, choose_plan_without_memory(call.args.problem, device), in);
    }
}

Tensor conv_norm_act_cuda(const Inputs& in) {
    const PreparedCall call = prepare(in, nullptr);
    launch(call, in);
    return call.y;
}

void conv_norm_act_out_cuda(const Inputs& in, const Tensor& out) {
    const PreparedCall call = prepare(in, &out);
    // Autograd then knows that what it may have saved of this memory is gone. Throws for an inference tensor outside of
    // inference mode.
    out.unsafeGetTensorImpl()->bump_version();
    launch(call, in);
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

}  // namespace

TORCH_LIBRARY_IMPL(fused_cna, CUDA, m) {
    m.impl("conv_norm_act", as_operator<conv_norm_act_cuda>);
    m.impl("conv_norm_act_out", as_operator<conv_norm_act_out_cuda, const Tensor&>);
}

// The checks and the output of both operators for tensors of any device, without the kernel: a machine without a GPU
// compares them with the Python ones.
TORCH_LIBRARY_FRAGMENT(fused_cna, m) {
    const auto any_device = [](auto* function) {
        return torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function);
    };
    m.def(("_checked_output(" + arguments + ") -> Tensor").c_str(), any_device(as_operator<checked_output>));
    m.def(("_check_out(" + arguments + ", Tensor out) -> ()").c_str(),
          any_device(as_operator<check_with_out, const Tensor&>));
}

}  // namespace fused_cna
