// The one place that decides which kernel runs a problem, with which tile and split. Pure and host only.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "conv_problem.h"
#include "device_info.h"
#include "strip_tile.h"
#include "tiles.h"

namespace fused_cna {

// cudnn is no kernel of this project: it stands for ATen's convolution, see cudnn_route.h. It is a plan only where it was
// measured or forced, because no estimate here knows what cuDNN does.
enum class Kernel : int32_t {
    direct,
    implicit_gemm_sm80,
    implicit_gemm_tf32x3,
    implicit_gemm_fp32,
    small_m,
    depthwise_toeplitz,
    grouped,
    depthwise,
    stem,
    cudnn,
};

// Those of this project.
inline constexpr std::array all_kernels{
    Kernel::direct,
    Kernel::implicit_gemm_sm80,
    Kernel::implicit_gemm_tf32x3,
    Kernel::implicit_gemm_fp32,
    Kernel::small_m,
    Kernel::depthwise_toeplitz,
    Kernel::grouped,
    Kernel::depthwise,
    Kernel::stem,
};

constexpr const char* kernel_name(Kernel kernel) {
    switch (kernel) {
        case Kernel::direct: return "direct";
        case Kernel::implicit_gemm_sm80: return "implicit_gemm_sm80";
        case Kernel::implicit_gemm_tf32x3: return "implicit_gemm_tf32x3";
        case Kernel::implicit_gemm_fp32: return "implicit_gemm_fp32";
        case Kernel::small_m: return "small_m";
        case Kernel::depthwise_toeplitz: return "depthwise_toeplitz";
        case Kernel::grouped: return "grouped";
        case Kernel::depthwise: return "depthwise";
        case Kernel::stem: return "stem";
        case Kernel::cudnn: return "cudnn";
    }
    return "unknown";
}

// How the implicit GEMM finds its rows; see kernels/activation_rows.cuh.
enum class Rows : int32_t { plain, masked, pointwise };

constexpr const char* rows_name(Rows rows) {
    switch (rows) {
        case Rows::plain: return "plain";
        case Rows::masked: return "masked";
        case Rows::pointwise: return "pointwise";
    }
    return "unknown";
}

// What a kernel is expected to take, in microseconds. The parts overlap, so the total is their largest and the overheads.
struct Estimate {
    double products_us = 0;  // the multiply-adds, padding and idle multiprocessors included
    double bytes_us = 0;     // device memory
    double latency_us = 0;   // the longest chain of dependent steps
    double overhead_us = 0;  // launches, and separate passes: conversions, the reduction of a split

    double total_us() const;

    // By the total. Where memory bounds several alike, the one that keeps the multiprocessors least busy is the best, and
    // then the one with the shortest chain; where nothing tells them apart they keep the order in which they were listed:
    // the most special kernel first, and its fastest rows.
    bool operator<(const Estimate& other) const;
};

struct Plan {
    Kernel kernel = Kernel::direct;
    int tile_index = 0;  // in the kernel's array in tiles.h
    Tile tile;           // that tile; k in values
    int stages = 1;
    int split_k = 1;
    Rows rows = Rows::plain;
    int lanes = 1;                   // threads that share one output's reduction, in `small_m`
    StripTile strips;                // of depthwise_toeplitz
    GroupedPart grouped;             // of that kernel only
    int64_t tile_p = 0, tile_q = 0;  // of the stem kernel: the rectangle of output pixels that a tile covers
    int64_t filter_rows = 0;         // of the stem kernel: those that one chunk of the reduction takes
    int access_bytes = 0;            // of one load of operands; 0 where loads are value by value
    bool convert_x = false;          // x is first copied to dense channels_last
    bool convert_weight = false;     // the weight is first copied to dense KRSC
    int64_t blocks = 0;
    int64_t workspace_bytes = 0;
    Estimate estimate;

    // Whether running it takes memory: a workspace, or copies of operands.
    bool allocates() const { return workspace_bytes > 0 || convert_x || convert_weight || kernel == Kernel::cudnn; }
};

// A plan that was considered. `illegal` says in words why it cannot run the problem, and is empty where it can.
struct Candidate {
    Plan plan;
    std::string illegal;
};

// Every kernel with every tile and split worth a thought, legal ones first, the fastest by estimate in front. Throws
// std::runtime_error, with the numbers, where not even `direct` can take the problem.
std::vector<Candidate> list_candidates(const ConvProblem& problem, const DeviceInfo& device);

// The first of them.
Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device);

// The first that needs no memory beyond its operands.
Plan choose_plan_without_memory(const ConvProblem& problem, const DeviceInfo& device);

// The plan of this whole name, else the best among those whose name begins so: a kernel ("direct"), a kernel and tile
// ("implicit_gemm_sm80 128x64x32"), or these and a split ("implicit_gemm_sm80 128x64x32 split 4") or rows ("... masked"), as
// to_string prints them. Throws std::runtime_error where no legal plan matches.
Plan find_plan(const ConvProblem& problem, const DeviceInfo& device, const std::string& name);

// The plan that to_string prints as this name, which is its whole name; where there is none, or it cannot run the problem,
// `illegal` says so.
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
