// The tiles of `small_m`, read by its plan and by its kernel.
#pragma once

#include <array>

namespace fused_cna::small_m {

// What one team of lanes makes. A block has as many teams as fit; how many lanes a team has, a power of two, is the plan's.
struct Tile {
    int rows = 0, channels = 0;
    int unroll = 0;  // 16-byte chunks of every filter and row that a lane has under way at once

    // Narrow loads are several to a chunk: one chunk is enough to have many under way.
    constexpr int unroll_of(int vector_bytes) const { return vector_bytes <= 4 ? 1 : unroll; }

    static constexpr int threads = 128;
    static constexpr int blocks_per_multiprocessor = 3;  // that registers allow: the launch bound
};

// Each has at least four 16-byte loads of the weight under way per lane, and one set of sums for several channels, so that a
// chunk of x is loaded and converted for all of them. More rows would need more registers than hide the latency, so further
// rows are further blocks, which find the weight in the L2.
inline constexpr std::array<Tile, 3> tiles{{{1, 4, 4}, {4, 4, 2}, {8, 2, 2}}};

struct Choice {
    int tile = 0;               // in tiles
    int lanes = 1;              // threads that share one output's reduction
    bool is_pointwise = false;  // one tap, that lies inside the image for every output pixel
};

}  // namespace fused_cna::small_m
