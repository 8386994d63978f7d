// The tiles of `direct`, read by its plan and its kernel.
#pragma once

#include <array>

#include "problem.h"

namespace fused_cna::direct {

// The wide tile shares both operands among many outputs; the narrow one is for groups of few output channels; the last is
// for depthwise, where no two output channels read the same input and a wider tile would idle.
inline constexpr std::array<BlockTile, 3> tiles{{{64, 64, 32}, {128, 8, 32}, {256, 1, 16}}};

inline constexpr int threads = 256;
inline constexpr int blocks_per_multiprocessor = 3;  // the launch bound, set by registers

struct Choice {
    int tile = 0;  // in tiles
};

}  // namespace fused_cna::direct
