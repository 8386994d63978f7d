// The one place that decides which kernel runs a problem, and how. Host only; pure except for forced and tuned plans.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "kernels/depthwise/tile.h"
#include "kernels/depthwise_toeplitz/layout.h"
#include "kernels/direct/tile.h"
#include "kernels/grouped/tile.h"
#include "kernels/implicit_gemm/tile.h"
#include "kernels/implicit_gemm_sm90/tile.h"
#include "kernels/small_m/tile.h"
#include "kernels/stem/tile.h"
#include "plan/device.h"
#include "problem.h"

namespace fused_cna {

// cudnn is not a kernel of this project: it stands for ATen's convolution, see torch/cudnn.h. It runs only where a
// measurement or force_plan chose it, because no estimate here models cuDNN.
enum class Kernel : int32_t {
    direct,
    implicit_gemm_sm80,
    implicit_gemm_tf32x3,
    implicit_gemm_fp32,
    implicit_gemm_sm90,
    small_m,
    depthwise_toeplitz,
    grouped,
    depthwise,
    stem,
    cudnn
};

const char* kernel_name(Kernel kernel);

// Each family's own choice, including the tile that its kernel is instantiated for.
using Choice = std::variant<direct::Choice, implicit_gemm::Choice, implicit_gemm_sm90::Choice, small_m::Choice,
                            depthwise_toeplitz::Choice, grouped::Choice, depthwise::Choice, stem::Choice>;

// The expected time of a kernel, in microseconds. The parts overlap: the total is the largest, plus the overheads.
struct Estimate {
    double products_us = 0;  // the multiply-adds, including padding and idle multiprocessors
    double bytes_us = 0;     // device memory
    double latency_us = 0;   // the longest chain of dependent steps
    double overhead_us = 0;  // launches, and separate passes: conversions, the reduction of a split

    double total_us() const;

    // By the total. Where memory bounds several alike, the one that uses the multiprocessors least is better, then the one
    // with the shortest chain. Equal plans keep the order of the list: the most specialised kernel first, and its fastest
    // addressing.
    bool operator<(const Estimate& other) const;
};

struct Plan {
    Kernel kernel = Kernel::direct;
    Choice choice;
    BlockTile tile;               // of one block; k in products
    int vector_bytes = 0;         // per load of operands; 0 for value by value
    bool convert_x = false;       // x is first copied to dense channels_last
    bool convert_weight = false;  // the weight is first copied to dense KRSC
    int64_t blocks = 0;
    int64_t workspace_bytes = 0;
    Estimate estimate;

    // Whether running it allocates: a workspace, or copies of operands.
    bool allocates() const { return workspace_bytes > 0 || convert_x || convert_weight || kernel == Kernel::cudnn; }
};

// A plan that was considered, and why it cannot run the problem; empty where it can.
struct Candidate {
    Plan plan;
    std::string unsupported_reason;

    bool is_supported() const { return unsupported_reason.empty(); }
};

// Every kernel with every tile and split worth comparing: supported ones first, fastest by estimate first. Throws
// std::runtime_error, with the numbers, where not even `direct` can take the problem.
std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device);

// The first of list_candidates.
Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device);

// The first that allocates nothing.
Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device);

// The plan with this name as to_string prints it, else the best whose name starts with it: a kernel ("direct"), a kernel and
// tile ("implicit_gemm_sm80 128x64x32"), or these and a split ("implicit_gemm_sm80 128x64x32 split 4") or addressing ("...
// masked"). Throws std::runtime_error where no supported plan matches.
Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

// The plan whose whole name, as to_string prints it, is this; or the reason why there is none.
Candidate find_exact_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

// Makes memoised_plan return find_plan(..., name) in the whole process, for tests and tuning; an empty name ends it. Returns
// the previous name.
std::string force_plan(const std::string& name);
bool is_plan_forced();

// The forced plan, else the tuned one (tuned.h), else choose_plan, computed once per problem and device. Safe to call from
// several threads.
Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device);

// For example "implicit_gemm_sm80 128x64x32 split 4 masked 16-byte".
std::string to_string(const Plan& plan);

// All sizes of the problem on one line, for error messages.
std::string to_string(const ConvProblem& problem);

}  // namespace fused_cna
