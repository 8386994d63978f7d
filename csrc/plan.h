// The one place that decides which kernel runs a problem, with which tile. Pure and host only.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string>

#include "conv_problem.h"

namespace fused_cna {

// A multiprocessor's limits, as the plan's estimates use them.
struct DeviceInfo {
    int compute_major = 9;
    int compute_minor = 0;
    int multiprocessors = 132;

    auto operator<=>(const DeviceInfo&) const = default;
};

enum class Kernel : int32_t { direct };

inline constexpr std::array<Kernel, 1> all_kernels{Kernel::direct};

constexpr const char* kernel_name(Kernel kernel) {
    switch (kernel) {
        case Kernel::direct: return "direct";
    }
    return "unknown";
}

// One block's share of the implicit GEMM: m output pixels, n output channels, k products a step.
struct Tile {
    int m = 0, n = 0, k = 0;

    auto operator<=>(const Tile&) const = default;
};

// The tiles that kernels/direct.cu instantiates. Wide shares both operands among many outputs; narrow is for groups of few
// output channels; the last one is depthwise, where no two output channels read the same input and wider tiles would idle.
inline constexpr std::array<Tile, 3> direct_tiles{{{64, 64, 32}, {128, 8, 32}, {256, 1, 16}}};

struct Plan {
    Kernel kernel = Kernel::direct;
    Tile tile;
    int64_t blocks = 0;

    auto operator<=>(const Plan&) const = default;
};

// The kernel, tile and grid for a problem. Throws std::runtime_error, with the numbers, where no kernel can take it.
Plan choose_plan(const ConvProblem& problem, const DeviceInfo& device);

// The plan for a problem with kernel and tile given, for tests and tuning. Throws std::runtime_error where that tile does
// not exist or cannot take the problem.
Plan make_plan(const ConvProblem& problem, Kernel kernel, Tile tile);

// choose_plan, costed once per problem and device and remembered. Safe to call from several threads.
Plan memoised_plan(const ConvProblem& problem, const DeviceInfo& device);

// For example "direct 64x64x32, 12 blocks".
std::string to_string(const Plan& plan);

// Every size of the problem on one line, for error messages.
std::string to_string(const ConvProblem& problem);

}  // namespace fused_cna
