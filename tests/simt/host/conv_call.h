// The simulated operator for C callers: its arguments and functions.
#pragma once
#include <cstdint>
#include <string>

#include "plan/plan.h"

namespace simt {

// One call of the operator; binding.py has the same layout. Names are zero-terminated.
struct ConvCall {
    struct Tensor {
        void* data;          // null where the tensor is absent
        int64_t sizes[4];    // in the order of torch's NCHW view, as are the strides
        int64_t strides[4];  // in elements
    };

    Tensor x, weight;
    Tensor dense_x, dense_weight;  // copies in dense channels_last, where the plan needs them
    Tensor residual, y;
    void* vectors[5];  // bias, norm_weight, norm_bias, running_mean, running_var: K elements each, dense
    double eps;
    double act_param;
    int64_t stride[2], padding[4], dilation[2], groups;
    int64_t seed;
    int64_t norm_is_float32;
    int64_t allow_tf32;
    int64_t starts_early;  // whether every launch of the call does
    char dtype[16];
    char act[16];
    char residual_order[16];
    char device[16];  // one of named_devices
    char plan[128];   // a name for find_plan; empty: choose_plan chooses
};

// The plan's data that Python needs.
struct PlanText {
    int64_t convert_x, convert_weight;
    char text[256];
};

// The plan for x and the weight as given, before any copy.
fused_cna::Plan plan_conv(const ConvCall& call);

// Every supported plan, one name per line, fastest by estimate first.
std::string list_plans(const ConvCall& call);

// Runs the planned kernel through the project's own run(), with a workspace of NaNs. Throws std::invalid_argument where the
// plan needs a copy that the call does not have.
void run_conv(const ConvCall& call);

}  // namespace simt
