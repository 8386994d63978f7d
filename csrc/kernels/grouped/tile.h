// The tiles of `grouped`, read by its plan and its kernel.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna::grouped {

// How x is read: a group's channels must be whole 16-byte chunks, or whole 4-byte words.
enum class Reader : int32_t { chunks, words };

// What a warp computes: 64 output pixels x column_blocks * 8 output channels of one group.
struct Tile {
    Reader reader = Reader::chunks;
    int column_blocks = 0;              // blocks of 8 columns that share each fragment of x
    int blocks_per_multiprocessor = 0;  // blocks of 256 threads, limited by registers: the launch bound

    static constexpr int fragments = 4;  // fragments of 16 pixels that share each fragment of the weight
    static constexpr int most_warps = 8, most_threads = most_warps * 32;
    static constexpr int slots() { return fragments * 16; }
    constexpr int columns() const { return column_blocks * 8; }
};

inline constexpr std::array<Tile, 5> tiles{{
    {Reader::chunks, 1, 4},
    {Reader::chunks, 2, 3},
    {Reader::chunks, 3, 2},
    {Reader::chunks, 4, 2},
    // Legal wherever `chunks` is too, as its reference.
    {Reader::words, 1, 4},
}};

// What a block computes: p x q output pixels of one image, and columns_per_group output channels of each of `groups`
// neighbouring groups. Where these are not all channels of a group, groups is 1.
struct Choice {
    int tile = 0;  // in tiles
    int p = 0, q = 0;
    int groups = 0, columns_per_group = 0;

    bool operator==(const Choice&) const = default;
};

}  // namespace fused_cna::grouped
