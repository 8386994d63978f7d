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

inline constexpr int depthwise_threads = 128;
inline constexpr int depthwise_columns = 7;  // of a strip: image sizes of real networks are multiples of 7
inline constexpr int depthwise_band_rows = 16;
inline constexpr int depthwise_chunks = 8;  // of a slab, at most
inline constexpr int depthwise_taps = 32;   // of any filter, whose weights are in shared memory at once

// A version of the depthwise kernel. A thread makes a strip of one output row, for as many neighbouring channels as lie in
// 16 bytes: a chunk. A block makes `strips` strips of a slab of up to 8 chunks.
struct DepthwiseTile {
    int filter = 0, stride = 0;         // in both directions; 0: takes any, and any dilation
    int blocks_per_multiprocessor = 0;  // the launch bound
    bool by_value = false;              // takes odd and multiplied channels, loads value by value

    constexpr bool takes_any() const { return filter == 0; }
    // The sums of all strips, and beside them the weights and the folds (12 bytes) of a slab.
    constexpr int64_t shared_bytes(int64_t value_bytes) const {
        const int64_t values = 16 / value_bytes, taps = takes_any() ? depthwise_taps : filter * filter;
        return depthwise_columns * values * depthwise_threads * 4 + taps * (depthwise_chunks * values + 4) * 4 +
               depthwise_chunks * values * 12;
    }

    bool operator==(const DepthwiseTile&) const = default;
};

// An image's rows are cut into bands of equal height, or the last is lower: strips of a band share rows of x.
constexpr int64_t depthwise_bands(int64_t p) { return (p + depthwise_band_rows - 1) / depthwise_band_rows; }

inline constexpr std::array<DepthwiseTile, 8> depthwise_tiles{{
    {3, 1, 4},
    {5, 1, 3},
    {7, 1, 3},
    {3, 2, 3},
    {5, 2, 3},
    {7, 2, 2},
    {0, 0, 4},
    {0, 0, 2, true},
}};

}  // namespace fused_cna
