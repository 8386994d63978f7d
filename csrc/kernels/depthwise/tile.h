// The versions of `depthwise`, read by its plan and its kernel.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna::depthwise {

inline constexpr int threads = 128;
inline constexpr int strip_columns = 7;  // image sizes of real networks are multiples of 7
inline constexpr int most_band_rows = 16;
inline constexpr int most_chunks = 8;  // per slab
inline constexpr int most_taps = 32;   // of any filter, whose weights are in shared memory at once

// A thread computes a strip of one output row in 16 bytes of neighbouring channels: a chunk. A block computes several strips
// of a slab of up to 8 chunks.
struct Tile {
    int filter = 0, stride = 0;         // in both directions; 0: any, also any dilation
    int blocks_per_multiprocessor = 0;  // the launch bound
    bool by_value = false;              // any number of channels and any multiplier; loads value by value

    constexpr bool takes_any() const { return filter == 0; }
    // The sums of all strips, and the weights and folds (12 bytes each) of a slab.
    constexpr int64_t shared_bytes(int64_t value_bytes) const {
        const int64_t values = 16 / value_bytes, taps = takes_any() ? most_taps : filter * filter;
        return strip_columns * values * threads * 4 + taps * (most_chunks * values + 4) * 4 + most_chunks * values * 12;
    }
};

// An image's rows are cut into bands of equal height, the last may be lower; strips of a band share rows of x.
constexpr int64_t bands_of(int64_t p) { return (p + most_band_rows - 1) / most_band_rows; }

inline constexpr std::array<Tile, 8> tiles{{
    {3, 1, 4},
    {5, 1, 3},
    {7, 1, 3},
    {3, 2, 3},
    {5, 2, 3},
    {7, 2, 2},
    {0, 0, 4},
    {0, 0, 2, true},
}};

struct Choice {
    int tile = 0;  // in tiles
};

}  // namespace fused_cna::depthwise
