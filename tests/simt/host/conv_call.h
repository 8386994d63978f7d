#pragma once
#include <cstdint>
#include <string>

namespace simt {

// One call of the operator as C sees it; binding.py has the same layout. Names are terminated by zeros.
struct ConvCall {
    struct Tensor {
        void* data;          // null where the tensor is absent
        int64_t sizes[4];    // in the order of torch's NCHW view, as are the strides
        int64_t strides[4];  // in elements
    };

    Tensor x, weight, residual, y;
    void* vectors[5];  // bias, norm_weight, norm_bias, running_mean, running_var: K elements each, dense
    double eps;
    double act_param;
    int64_t stride[2], padding[4], dilation[2], groups;
    int64_t tile[3];  // m, n, k, where a kernel is given; all 0: the tile that the plan would choose
    int64_t seed;
    int64_t norm_is_float32;
    char dtype[16];
    char act[16];
    char residual_order[16];
    char kernel[16];  // empty: whatever the plan chooses
};

// Runs it through csrc/'s plan and run; returns the plan in words.
std::string run_conv(const ConvCall& call);

}  // namespace simt
