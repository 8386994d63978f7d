// The tiles of `stem`, read by its plan and its kernel.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna::stem {

// m output pixels, a rectangle of one image whose sides the plan chooses, by n channels. Every warp computes its pixels in
// all n channels.
struct Tile {
    int m = 0, n = 0, warps = 0;
    int blocks_per_multiprocessor = 0;  // the launch bound, set by registers

    constexpr int threads() const { return warps * 32; }
    // The tables of pixels (24 bytes) and channels (12 bytes), before everything whose size depends on the problem.
    constexpr int64_t table_bytes() const { return m * 24 + n * 12; }
};

inline constexpr std::array<Tile, 6> tiles{{
    // Many pixels share one packing of the weights.
    {256, 64, 8, 2},
    {256, 32, 8, 2},
    {128, 64, 4, 4},
    {128, 32, 4, 4},
    // Small images and batches, where large tiles would leave multiprocessors idle.
    {64, 64, 4, 4},
    {64, 32, 4, 4},
}};

struct Choice {
    int tile = 0;                    // in tiles
    int64_t tile_p = 0, tile_q = 0;  // sides of the rectangle of output pixels
    int64_t filter_rows = 0;         // per chunk of the reduction
};

}  // namespace fused_cna::stem
