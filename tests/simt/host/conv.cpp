// From a ConvCall to the project's own plan and run.
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <simt/block.h>
#include <simt/prerequisites.h>

#include "conv_call.h"
#include "guarded.h"
#include "kernels/run.h"
#include "plan/device.h"
#include "plan/layout.h"
#include "plan/plan.h"

namespace simt {

namespace {

using fused_cna::ConvProblem;

template <class Found>
auto require(const Found& found, const char* what, const char* name) {
    if (!found) throw std::invalid_argument(std::string("no ") + what + " is called " + name);
    return *found;
}

fused_cna::DType find_dtype(std::string_view name) {
    using fused_cna::DType;
    for (DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        if (name == fused_cna::dtype_name(dtype)) return dtype;
    }
    throw std::invalid_argument("no storage type is called " + std::string(name));
}

fused_cna::Epilogue make_epilogue(const ConvCall& call) {
    return {
        .bias = call.vectors[0],
        .norm_weight = call.vectors[1],
        .norm_bias = call.vectors[2],
        .running_mean = call.vectors[3],
        .running_var = call.vectors[4],
        .eps = static_cast<float>(call.eps),
        .norm_is_float32 = call.norm_is_float32 != 0,
        .activation = {require(fused_cna::find_activation(call.act), "activation", call.act).value,
                       static_cast<float>(call.act_param)},
        .residual_order =
            require(fused_cna::find_residual_order(call.residual_order), "residual order", call.residual_order),
    };
}

fused_cna::TensorView view_of(const ConvCall::Tensor& tensor) {
    const auto [sizes, strides] = std::pair(tensor.sizes, tensor.strides);
    return {tensor.data, {sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0], strides[1], strides[2], strides[3]}};
}

fused_cna::ConvArgs make_args(const ConvCall& call) {
    const fused_cna::Epilogue epilogue = make_epilogue(call);
    fused_cna::OperatorCall given{.x = view_of(call.x),
                                  .weight = view_of(call.weight),
                                  .stride = {call.stride[0], call.stride[1]},
                                  .padding = {call.padding[0], call.padding[1], call.padding[2], call.padding[3]},
                                  .dilation = {call.dilation[0], call.dilation[1]},
                                  .groups = call.groups,
                                  .dtype = find_dtype(call.dtype),
                                  .allow_tf32 = call.allow_tf32 != 0,
                                  .has_norm = call.vectors[3] != nullptr,
                                  .activation = epilogue.activation.function};
    if (call.residual.data) given.residual = epilogue.residual_order;
    fused_cna::ConvArgs args = fused_cna::make_args(given);
    args.residual = call.residual.data;
    args.residual_strides = fused_cna::as_strides(view_of(call.residual).strides);
    args.y = call.y.data;
    args.y_strides = fused_cna::as_strides(view_of(call.y).strides);
    args.epilogue = epilogue;
    return args;
}

fused_cna::Plan make_plan(const ConvCall& call, const ConvProblem& problem) {
    const fused_cna::DeviceInfo device = fused_cna::find_device(call.device);
    return call.plan[0] ? fused_cna::find_plan(problem, device, call.plan) : fused_cna::choose_plan(problem, device);
}

const ConvCall::Tensor& require_copy(const ConvCall::Tensor& copy, const char* of, const fused_cna::Plan& plan) {
    if (!copy.data)
        throw std::invalid_argument(fused_cna::to_string(plan) + " wants " + of + " copied to dense channels_last first");
    return copy;
}

void take_copies(const ConvCall& call, const fused_cna::Plan& plan, fused_cna::ConvArgs& args) {
    if (plan.convert_x) {
        const ConvCall::Tensor& copy = require_copy(call.dense_x, "x", plan);
        args.x = copy.data;
        args.x_strides = fused_cna::as_strides(view_of(copy).strides);
    }
    if (plan.convert_weight) {
        const ConvCall::Tensor& copy = require_copy(call.dense_weight, "the weight", plan);
        args.weight = copy.data;
        args.weight_strides = fused_cna::as_filter_strides(view_of(copy).strides);
    }
}

// From the first element to the end of the last.
int64_t bytes_of(const ConvCall::Tensor& tensor, int64_t element_bytes) {
    int64_t elements = 1;
    for (int i = 0; i < 4; ++i) {
        if (tensor.sizes[i] == 0) return 0;
        elements += (tensor.sizes[i] - 1) * tensor.strides[i];
    }
    return elements * element_bytes;
}

// All memory that a call's kernels get: operands and their copies. y comes first, because it may also be the residual.
std::vector<Memory> memory_of(const ConvCall& call, std::vector<float>& workspace) {
    const int64_t element = fused_cna::size_in_bytes(find_dtype(call.dtype));
    const int64_t norm_element = call.norm_is_float32 ? sizeof(float) : element, k = call.weight.sizes[0];
    const auto tensor = [&](const char* name, const ConvCall::Tensor& of) {
        return Memory{name, of.data, bytes_of(of, element)};
    };
    std::vector<Memory> memory{tensor("y", call.y),
                               tensor("x", call.x),
                               tensor("the weight", call.weight),
                               tensor("the copy of x", call.dense_x),
                               tensor("the copy of the weight", call.dense_weight),
                               tensor("the residual", call.residual),
                               {"the bias", call.vectors[0], k * element},
                               {"norm_weight", call.vectors[1], k * norm_element},
                               {"norm_bias", call.vectors[2], k * norm_element},
                               {"running_mean", call.vectors[3], k * norm_element},
                               {"running_var", call.vectors[4], k * norm_element},
                               {"the workspace", workspace.data(), std::ssize(workspace) * int64_t{sizeof(float)}}};
    std::erase_if(memory, [](const Memory& one) { return !one.first || one.bytes == 0; });
    return memory;
}

}  // namespace

fused_cna::Plan plan_conv(const ConvCall& call) { return make_plan(call, make_args(call).problem); }

std::string list_plans(const ConvCall& call) {
    std::string names;
    for (const fused_cna::Candidate& candidate :
         fused_cna::list_candidates(make_args(call).problem, fused_cna::find_device(call.device))) {
        if (candidate.is_supported()) names += fused_cna::to_string(candidate.plan) + "\n";
    }
    return names;
}

void run_conv(const ConvCall& call) {
    fused_cna::ConvArgs args = make_args(call);
    const fused_cna::Plan plan = make_plan(call, args.problem);
    take_copies(call, plan, args);
    std::vector<float> workspace(plan.workspace_bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
    args.workspace = workspace.data();
    set_memory(memory_of(call, workspace));
    set_seed(static_cast<uint64_t>(call.seed));
    fused_cna::run(args, plan, {.starts_early = call.starts_early != 0});
}

}  // namespace simt

extern "C" int64_t simt_conv_call_bytes() { return sizeof(simt::ConvCall); }

extern "C" int simt_plan_conv(const simt::ConvCall* call, simt::PlanText* plan, char* error_text, int64_t error_size) {
    return simt::guarded({error_text, error_size}, [&]() -> const char* {
        const fused_cna::Plan chosen = simt::plan_conv(*call);
        plan->convert_x = chosen.convert_x;
        plan->convert_weight = chosen.convert_weight;
        simt::report({plan->text, sizeof plan->text}, simt::succeeded, fused_cna::to_string(chosen));
        return nullptr;
    });
}

extern "C" int simt_list_plans(const simt::ConvCall* call, char* names, int64_t names_size, char* error_text,
                               int64_t error_size) {
    return simt::guarded({error_text, error_size}, [&]() -> const char* {
        simt::report({names, names_size}, simt::succeeded, simt::list_plans(*call));
        return nullptr;
    });
}

extern "C" int simt_run_conv(const simt::ConvCall* call, char* error_text, int64_t error_size) {
    return simt::guarded({error_text, error_size}, [&]() -> const char* {
        simt::run_conv(*call);
        return nullptr;
    });
}
