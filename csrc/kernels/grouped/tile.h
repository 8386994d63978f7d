// The tiles of `grouped`, read by its plan and by its kernel.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna::grouped {

// How x is read: a group's channels are whole 16-byte chunks, or whole 4-byte words.
enum class Reader : int32_t { chunks, words };

// What a warp makes: 64 output pixels x column_blocks * 8 output channels of one group.
struct Tile {
    Reader reader = Reader::chunks;
    int column_blocks = 0;              // that share each fragment of x
    int blocks_per_multiprocessor = 0;  // of 256 threads, that registers allow: the launch bound

    static constexpr int fragments = 4;  // of 16 pixels, that share each fragment of the weight
    static constexpr int most_warps = 8, most_threads = most_warps * 32;
    static constexpr int slots() { return fragments * 16; }
    constexpr int columns() const { return column_blocks * 8; }
};

inline constexpr std::array<Tile, 5> tiles{{
    {Reader::chunks, 1, 4},
    {Reader::chunks, 2, 3},
    {Reader::chunks, 3, 2},
    {Reader::chunks, 4, 2},
    // Also legal wherever `chunks` is, as its reference.
    {Reader::words, 1, 4},
}};

// What a block makes: p x q output pixels of one image, and so many output channels of each of some groups that lie side by
// side. Channels that are not all of a group's come from one group.
struct Choice {
    int tile = 0;  // in tiles
    int p = 0, q = 0;
    int groups = 0, columns_per_group = 0;

    bool operator==(const Choice&) const = default;
};

}  // namespace fused_cna::grouped
