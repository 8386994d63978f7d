// The tiles of `small_m`, read by its plan and its kernel.
#pragma once

#include <array>

namespace fused_cna::small_m {

// What one team of lanes computes. A block has as many teams as fit; the plan chooses the lanes per team, a power of two.
struct Tile {
    int rows = 0, channels = 0;
    int unroll = 0;  // 16-byte chunks of every filter and row that a lane has in flight at once

    // Narrow loads are several per chunk, so one chunk is enough to keep many in flight.
    constexpr int unroll_of(int vector_bytes) const { return vector_bytes <= 4 ? 1 : unroll; }

    static constexpr int threads = 128;
    static constexpr int blocks_per_multiprocessor = 3;  // the launch bound, set by registers
};

// Each has at least four 16-byte loads of the weight in flight per lane, and sums for several channels, so that a chunk of x
// is loaded and converted once for all of them. More rows would need too many registers to hide latency, so further rows go
// to further blocks, which find the weight in the L2.
inline constexpr std::array<Tile, 3> tiles{{{1, 4, 4}, {4, 4, 2}, {8, 2, 2}}};

struct Choice {
    int tile = 0;               // in tiles
    int lanes = 1;              // lanes that share one output's reduction
    bool is_pointwise = false;  // one tap, inside the image for every output pixel
};

}  // namespace fused_cna::small_m
