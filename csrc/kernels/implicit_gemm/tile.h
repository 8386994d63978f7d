// The tiles of the implicit GEMM, read by its plan and its kernels.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna::implicit_gemm {

// The depth is in bytes, because an MMA takes 32 bytes of a row whatever the type.
struct Tile {
    int m = 0, n = 0, k_bytes = 0;
    int stages = 0;  // tiles of operands in flight or in use at once
    int warps_m = 0, warps_n = 0;
    int blocks_per_multiprocessor = 0;  // the launch bound, set by registers
    bool takes_narrow_vectors = false;  // also instantiated for loads of 8 and 4 bytes
    bool takes_any_filter = false;      // also instantiated with plain addressing

    constexpr int threads() const { return warps_m * warps_n * 32; }
    // Operands, and the tables of rows (16 bytes each) and channels (12 bytes each).
    constexpr int64_t shared_bytes() const { return int64_t{stages} * (m + n) * k_bytes + m * 16 + n * 12; }
};

inline constexpr std::array<Tile, 9> sm80_tiles{{
    // Most products per byte of shared memory: large layers with many channels.
    {256, 128, 64, 3, 4, 2, 1},
    {128, 256, 64, 3, 2, 4, 1},
    // Two blocks per multiprocessor: one's epilogue overlaps the other's products.
    {128, 128, 64, 4, 2, 2, 2},
    // The same, deeper: half as many barriers per product, for long reductions.
    {128, 128, 128, 3, 2, 4, 1},
    // Few output channels, many pixels: early layers.
    {256, 64, 64, 4, 4, 2, 1},
    {128, 64, 64, 6, 2, 2, 2, true},
    {128, 32, 64, 6, 4, 1, 3, true},
    // Few pixels: late layers and small batches, where large tiles would leave multiprocessors idle.
    {64, 64, 128, 5, 2, 2, 2},
    {64, 64, 64, 6, 2, 2, 3, true, true},
}};

// Each product is three, operands are split in two, and sums are kept twice (chunk and total): at most 48 results per
// thread.
inline constexpr std::array<Tile, 4> tf32x3_tiles{{
    {192, 64, 64, 4, 4, 2, 1},
    {96, 64, 64, 4, 2, 2, 2},
    {128, 32, 64, 6, 4, 1, 2, true},
    {64, 64, 64, 6, 2, 2, 2, true, true},
}};

// CUDA cores: 8 x 8 results per thread in the large tiles, 8 x 4 in the small ones, each kept twice: for the current chunk
// of products and for the total.
inline constexpr std::array<Tile, 4> fp32_tiles{{
    {128, 128, 64, 4, 4, 2, 1},
    {128, 64, 64, 4, 4, 1, 2},
    {128, 32, 64, 4, 4, 1, 2, true},
    {64, 64, 64, 4, 2, 2, 3, true, true},
}};

// How the rows of the left matrix are found; see kernels/common/gather_rows.cuh.
enum class Addressing : int32_t { plain, masked, pointwise };

constexpr const char* addressing_name(Addressing addressing) {
    constexpr const char* names[] = {"plain", "masked", "pointwise"};
    return names[static_cast<int>(addressing)];
}

struct Choice {
    int tile = 0;  // index in the kernel's tiles
    int stages = 0;
    int split_k = 1;  // blocks that share one tile's reduction
    Addressing addressing = Addressing::plain;
};

}  // namespace fused_cna::implicit_gemm
