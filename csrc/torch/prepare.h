// From the operator's arguments to kernel arguments and output memory, and from a plan to its launch.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "args.h"
#include "plan/plan.h"
#include "torch/check.h"

namespace fused_cna {

// A call whose arguments passed every check, with memory for its output. Owns what the kernel's pointers point to.
struct PreparedCall {
    CheckedInputs checked;
    bool y_is_given = false;  // by the caller, who keeps it
    ConvArgs args;
    at::Tensor y;
    std::array<at::Tensor, 5> vectors;  // bias and norm vectors, contiguous; the caller's tensors where they already were
};

// The output goes to `out`, or to new memory where that is null.
PreparedCall prepare(const Inputs& in, const at::Tensor* out);

// Top, bottom, left, right from a padding of two or four numbers.
std::array<int64_t, 4> all_pads(at::IntArrayRef padding);

// Steps of prepare(), public so that they can be timed one by one.
ConvArgs make_args(const Inputs& in, const CheckedInputs& checked);
at::Tensor allocate_output(const Inputs& in, const ConvProblem& problem);
void complete_args(const Inputs& in, PreparedCall& call);  // call.checked and call.y must be set

// Runs a plan with the copies and the workspace that it needs. They are freed on return, which is safe: the caching
// allocator reuses memory in stream order.
void launch_plan(ConvArgs args, const Plan& plan, const Inputs& in, Stream stream);

}  // namespace fused_cna
