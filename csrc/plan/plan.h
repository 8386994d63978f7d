// The one place that decides which kernel runs a problem, and how. Pure and host only.
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

// cudnn is no kernel of this project: it stands for ATen's convolution, see torch/cudnn.h. It is a plan only where it was
// measured or forced, because no estimate here knows what cuDNN does.
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

// What each family chooses for itself, among it the tile that its kernel is instantiated for.
using Choice = std::variant<direct::Choice, implicit_gemm::Choice, implicit_gemm_sm90::Choice, small_m::Choice,
                            depthwise_toeplitz::Choice, grouped::Choice, depthwise::Choice, stem::Choice>;

// What a kernel is expected to take, in microseconds. The parts overlap, so the total is their largest and the overheads.
struct Estimate {
    double products_us = 0;  // the multiply-adds, padding and idle multiprocessors included
    double bytes_us = 0;     // device memory
    double latency_us = 0;   // the longest chain of dependent steps
    double overhead_us = 0;  // launches, and separate passes: conversions, the reduction of a split

    double total_us() const;

    // By the total. Where memory bounds several alike, the one that keeps the multiprocessors least busy is the best, and
    // then the one with the shortest chain; where nothing tells them apart they keep the order in which they were listed:
    // the most special kernel first, and its fastest addressing.
    bool operator<(const Estimate& other) const;
};

struct Plan {
    Kernel kernel = Kernel::direct;
    Choice choice;
    BlockTile tile;               // of one block, k in products
    int vector_bytes = 0;         // of one load of operands; 0 where loads are value by value
    bool convert_x = false;       // x is first copied to dense channels_last
    bool convert_weight = false;  // the weight is first copied to dense KRSC
    int64_t blocks = 0;
    int64_t workspace_bytes = 0;
    Estimate estimate;

    // Whether running it takes memory: a workspace, or copies of operands.
    bool allocates() const { return workspace_bytes > 0 || convert_x || convert_weight || kernel == Kernel::cudnn; }
};

// A plan that was considered, and in words why it cannot run the problem; empty where it can.
struct Candidate {
    Plan plan;
    std::string unsupported_reason;

    bool is_supported() const { return unsupported_reason.empty(); }
};

// Every kernel with every tile and split worth comparing, supported ones first, the fastest by estimate in front. Throws
// std::runtime_error, with the numbers, where not even `direct` can take the problem.
std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device);

// The first of them.
Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device);

// The first that needs no memory beyond its operands.
Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device);

// The plan of this whole name, else the best among those whose name begins so: a kernel ("direct"), a kernel and tile
// ("implicit_gemm_sm80 128x64x32"), or these and a split ("implicit_gemm_sm80 128x64x32 split 4") or addressing ("...
// masked"), as to_string prints them. Throws std::runtime_error where no supported plan matches.
Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

// The plan that to_string prints as this name, which is its whole name; or the reason why there is none.
Candidate find_exact_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

// Makes memoised_plan answer with find_plan(..., name) in this whole process, for tests and tuning; an empty name ends it.
// Returns the name that was forced before.
std::string force_plan(const std::string& name);
bool is_plan_forced();

// The forced plan, else the tuned one (tuned.h), else choose_plan, costed once per problem and device and remembered. Safe
// to call from several threads.
Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device);

// For example "implicit_gemm_sm80 128x64x32 split 4 masked 16-byte".
std::string to_string(const Plan& plan);

// Every size of the problem on one line, for error messages.
std::string to_string(const ConvProblem& problem);

}  // namespace fused_cna
