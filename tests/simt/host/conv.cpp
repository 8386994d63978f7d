#include <stdexcept>
#include <string>

#include <simt/block.h>

#include "conv_args.h"
#include "conv_call.h"
#include "guarded.h"
#include "plan.h"
#include "run.h"

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

fused_cna::Kernel find_kernel(std::string_view name) {
    std::string known;
    for (fused_cna::Kernel kernel : fused_cna::all_kernels) {
        if (name == fused_cna::kernel_name(kernel)) return kernel;
        known += std::string(" ") + fused_cna::kernel_name(kernel);
    }
    throw std::invalid_argument("no kernel is called " + std::string(name) + "; there are" + known);
}

ConvProblem make_problem(const ConvCall& call) {
    return {
        .n = call.x.sizes[0],
        .c = call.x.sizes[1],
        .h = call.x.sizes[2],
        .w = call.x.sizes[3],
        .k = call.weight.sizes[0],
        .r = call.weight.sizes[2],
        .s = call.weight.sizes[3],
        .stride_h = call.stride[0],
        .stride_w = call.stride[1],
        .pad_top = call.padding[0],
        .pad_bottom = call.padding[1],
        .pad_left = call.padding[2],
        .pad_right = call.padding[3],
        .dil_h = call.dilation[0],
        .dil_w = call.dilation[1],
        .groups = call.groups,
        .dtype = find_dtype(call.dtype),
    };
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
        .activation = require(fused_cna::find_activation(call.act), "activation", call.act).value,
        .activation_param = static_cast<float>(call.act_param),
        .residual_order =
            require(fused_cna::find_residual_order(call.residual_order), "residual order", call.residual_order),
    };
}

fused_cna::Strides strides_of(const ConvCall::Tensor& tensor) {
    return {tensor.strides[0], tensor.strides[1], tensor.strides[2], tensor.strides[3]};
}

fused_cna::ConvArgs make_args(const ConvCall& call) {
    const int64_t* weight_strides = call.weight.strides;
    return {
        .problem = make_problem(call),
        .x = call.x.data,
        .x_strides = strides_of(call.x),
        .weight = call.weight.data,
        .weight_strides = {weight_strides[0], weight_strides[1], weight_strides[2], weight_strides[3]},
        .residual = call.residual.data,
        .residual_strides = strides_of(call.residual),
        .y = call.y.data,
        .y_strides = strides_of(call.y),
        .epilogue = make_epilogue(call),
    };
}

fused_cna::Plan make_plan(const ConvCall& call, const ConvProblem& problem) {
    fused_cna::Plan chosen = fused_cna::choose_plan(problem, fused_cna::DeviceInfo{});
    if (!call.kernel[0]) return chosen;
    fused_cna::Kernel kernel = find_kernel(call.kernel);
    fused_cna::Tile tile{static_cast<int>(call.tile[0]), static_cast<int>(call.tile[1]), static_cast<int>(call.tile[2])};
    if (tile != fused_cna::Tile{}) return fused_cna::make_plan(problem, kernel, tile);
    if (chosen.kernel == kernel) return chosen;
    throw std::invalid_argument("the plan would not choose " + std::string(call.kernel) + " here, but " +
                                fused_cna::to_string(chosen) + "; give the tile too");
}

}  // namespace

std::string run_conv(const ConvCall& call) {
    fused_cna::ConvArgs args = make_args(call);
    fused_cna::Plan plan = make_plan(call, args.problem);
    set_seed(static_cast<uint64_t>(call.seed));
    fused_cna::run(args, plan, nullptr);
    return fused_cna::to_string(plan);
}

}  // namespace simt

extern "C" int64_t simt_conv_call_bytes() { return sizeof(simt::ConvCall); }

extern "C" int simt_run_conv(const simt::ConvCall* call, char* plan_text, int64_t plan_size, char* error_text,
                             int64_t error_size) {
    return simt::guarded({error_text, error_size}, [&]() -> const char* {
        simt::report({plan_text, plan_size}, simt::succeeded, simt::run_conv(*call));
        return nullptr;
    });
}
