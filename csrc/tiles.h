// The tiles that each kernel is instantiated for: read by the plan, which chooses one by its index, and by the kernels.
#pragma once

#include <array>
#include <cstdint>

namespace fused_cna {

// One block's share of the implicit GEMM: m output pixels, n output channels, k products a step.
struct Tile {
    int m = 0, n = 0, k = 0;

    bool operator==(const Tile&) const = default;
};

// Wide shares both operands among many outputs; narrow is for groups of few output channels; the last is depthwise, where no
// two output channels read the same input and wider tiles would idle.
inline constexpr std::array<Tile, 3> direct_tiles{{{64, 64, 32}, {128, 8, 32}, {256, 1, 16}}};

// A tile of the tensor-core kernel. Its depth is in bytes, because an MMA takes 32 bytes of a row whatever the type.
struct GemmTile {
    int m = 0, n = 0, k_bytes = 0;
    int stages = 0;  // tiles of operands under way at once
    int warps_m = 0, warps_n = 0;
    int blocks_per_multiprocessor = 0;   // that registers allow: the launch bound
    bool takes_narrow_accesses = false;  // also instantiated for accesses of 8 and 4 bytes
    bool takes_any_filter = false;       // also instantiated with plain rows

    constexpr int threads() const { return warps_m * warps_n * 32; }
    // Operands, and beside them the tables of rows (24 bytes) and of channels (12 bytes).
    constexpr int64_t shared_bytes() const { return int64_t{stages} * (m + n) * k_bytes + m * 24 + n * 12; }

    bool operator==(const GemmTile&) const = default;
};

inline constexpr std::array<GemmTile, 9> implicit_gemm_tiles{{
    // Most products per byte of shared memory: large layers with many channels.
    {256, 128, 64, 3, 4, 2, 1},
    {128, 256, 64, 3, 2, 4, 1},
    // Two blocks a multiprocessor: one's epilogue hides behind the other's products.
    {128, 128, 64, 4, 2, 2, 2},
    // The same, deeper: half as many barriers per product where the reduction is long.
    {128, 128, 128, 3, 2, 4, 1},
    // Few output channels, many pixels: early layers.
    {256, 64, 64, 4, 4, 2, 1},
    {128, 64, 64, 6, 2, 2, 2, true},
    {128, 32, 64, 6, 4, 1, 3, true},
    // Few pixels: late layers and small batches, where large tiles would leave multiprocessors idle.
    {64, 64, 128, 5, 2, 2, 2},
    {64, 64, 64, 6, 2, 2, 3, true, true},
}};

// A tile of the stem kernel: m output pixels, a rectangle of one image whose sides the plan chooses, by n channels. Every
// warp makes its own pixels in all n channels.
struct StemTile {
    int m = 0, n = 0, warps = 0;
    int blocks_per_multiprocessor = 0;  // that registers allow: the launch bound

    constexpr int threads() const { return warps * 32; }
    // The tables of pixels (24 bytes) and of channels (12 bytes), which lie before everything that the problem sizes.
    constexpr int64_t table_bytes() const { return m * 24 + n * 12; }

    bool operator==(const StemTile&) const = default;
};

inline constexpr std::array<StemTile, 6> stem_tiles{{
    // Many pixels share one repacking of the weights.
    {256, 64, 8, 2},
    {256, 32, 8, 2},
    {128, 64, 4, 4},
    {128, 32, 4, 4},
    // Small images and batches, where large tiles would leave multiprocessors idle.
    {64, 64, 4, 4},
    {64, 32, 4, 4},
}};

}  // namespace fused_cna
