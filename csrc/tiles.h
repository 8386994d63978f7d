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

// A tile of the implicit GEMM. Its depth is in bytes, because an MMA takes 32 bytes of a row whatever the type.
struct GemmTile {
    int m = 0, n = 0, k_bytes = 0;
    int stages = 0;  // tiles of operands under way at once
    int warps_m = 0, warps_n = 0;
    int blocks_per_multiprocessor = 0;   // that registers allow: the launch bound
    bool takes_narrow_accesses = false;  // also instantiated for accesses of 8 and 4 bytes
    bool takes_any_filter = false;       // also instantiated with plain rows

    constexpr int threads() const { return warps_m * warps_n * 32; }
    // Operands, and beside them the tables of rows (16 bytes) and of channels (12 bytes).
    constexpr int64_t shared_bytes() const { return int64_t{stages} * (m + n) * k_bytes + m * 16 + n * 12; }

    bool operator==(const GemmTile&) const = default;
};

inline constexpr std::array<GemmTile, 9> implicit_gemm_sm80_tiles{{
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

// Three products for one, operands split in two, and sums kept twice, as the chunk and the total: 48 results a thread at
// most.
inline constexpr std::array<GemmTile, 4> implicit_gemm_tf32x3_tiles{{
    {192, 64, 64, 4, 4, 2, 1},
    {96, 64, 64, 4, 2, 2, 2},
    {128, 32, 64, 6, 4, 1, 2, true},
    {64, 64, 64, 6, 2, 2, 2, true, true},
}};

// CUDA cores: 8 x 8 results a thread in the large tiles, 8 x 4 in the small ones, each once for the running chunk of
// products and once for the total.
inline constexpr std::array<GemmTile, 4> implicit_gemm_fp32_tiles{{
    {128, 128, 64, 4, 4, 2, 1},
    {128, 64, 64, 4, 4, 1, 2},
    {128, 32, 64, 4, 4, 1, 2, true},
    {64, 64, 64, 4, 2, 2, 3, true, true},
}};
// A tile of the kernel for few output pixels: what one team of lanes makes. A block has as many teams as fit; how many lanes
// a team has, a power of two, is the plan's.
struct SmallMTile {
    int rows = 0, channels = 0;
    int unroll = 0;  // 16-byte chunks of every filter and row that a lane has under way at once

    // Narrow accesses are several to a chunk: one chunk is enough to have many under way.
    constexpr int unroll_of(int access_bytes) const { return access_bytes <= 4 ? 1 : unroll; }

    static constexpr int threads = 128;
    static constexpr int blocks_per_multiprocessor = 3;  // that registers allow: the launch bound

    bool operator==(const SmallMTile&) const = default;
};

// Each has at least four 16-byte loads of the weight under way per lane, and one set of sums for several channels, so that a
// chunk of x is loaded and converted for all of them. More rows would need more registers than hide the latency, so further
// rows are further blocks, which find the weight in the L2.
inline constexpr std::array<SmallMTile, 3> small_m_tiles{{{1, 4, 4}, {4, 4, 2}, {8, 2, 2}}};

// How the kernel of narrow groups reads x: a group's channels are whole 16-byte chunks, or whole 4-byte words.
enum class GroupReader : int32_t { chunks, words };

constexpr const char* reader_name(GroupReader reader) { return reader == GroupReader::chunks ? "chunks" : "words"; }

// What a warp of the kernel of narrow groups makes: 64 output pixels x column_blocks * 8 output channels of one group.
struct GroupedTile {
    GroupReader reader = GroupReader::chunks;
    int column_blocks = 0;              // that share each fragment of x
    int blocks_per_multiprocessor = 0;  // of 256 threads, that registers allow: the launch bound

    static constexpr int fragments = 4;  // of 16 pixels, that share each fragment of the weight
    static constexpr int most_warps = 8, most_threads = most_warps * 32;
    static constexpr int slots() { return fragments * 16; }
    constexpr int columns() const { return column_blocks * 8; }

    bool operator==(const GroupedTile&) const = default;
};

inline constexpr std::array<GroupedTile, 5> grouped_tiles{{
    {GroupReader::chunks, 1, 4},
    {GroupReader::chunks, 2, 3},
    {GroupReader::chunks, 3, 2},
    {GroupReader::chunks, 4, 2},
    // Of every group that chunks can serve, too: what they are compared with.
    {GroupReader::words, 1, 4},
}};

// What a block of that kernel makes: p x q output pixels of one image, and so many output channels of each of some groups
// that lie side by side. Channels that are not all of a group's come from one group.
struct GroupedPart {
    int p = 0, q = 0;
    int groups = 0, columns_per_group = 0;

    bool operator==(const GroupedPart&) const = default;
};

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
