// The tiles of the Hopper kernel, read by its plan and its kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fused_cna::implicit_gemm_sm90 {

// How the consumer warpgroups share a block's tiles. One producer warpgroup is added to each.
enum class Schedule : int32_t {
    single,       // one warpgroup
    cooperative,  // two, each with half of a tile's rows
    pingpong      // two, each with every second tile: one's epilogue overlaps the other's products
};

constexpr const char* schedule_name(Schedule schedule) {
    constexpr const char* names[] = {"single", "cooperative", "pingpong"};
    return names[static_cast<int>(schedule)];
}

// The depth is 128 bytes: the widest swizzle, and four wgmma products.
struct Tile {
    int m = 0, n = 0;
    Schedule schedule = Schedule::single;
    bool takes_narrow_vectors = false;  // also instantiated for a gather by 8 and 4 bytes
    bool takes_any_filter = false;      // also instantiated with plain addressing

    static constexpr int k_bytes = 128, slice = 32, most_stages = 8, least_stages = 3;
    static constexpr int64_t shared_limit = 227 * 1024;

    constexpr int consumers() const { return schedule == Schedule::single ? 1 : 2; }
    constexpr int threads() const { return (1 + consumers()) * 128; }
    constexpr int rows_of_consumer() const { return schedule == Schedule::cooperative ? m / 2 : m; }
    constexpr int64_t stage_bytes() const { return int64_t{m + n} * k_bytes; }

    // The output before its store, the tables of folds (12 bytes per channel), and the barriers.
    constexpr int64_t bytes_beside_stages(int64_t value_bytes) const {
        const int64_t staged = int64_t{consumers()} * rows_of_consumer() * n * value_bytes;
        const int64_t barriers = (3 * most_stages + 4) * 8;
        return staged + int64_t{consumers()} * n * 12 + barriers;
    }

    // Tiles of operands in flight or in use at once: as many as fit.
    constexpr int stages(int64_t value_bytes) const {
        const int64_t bytes = shared_limit - bytes_beside_stages(value_bytes);
        return static_cast<int>(std::clamp<int64_t>(bytes / stage_bytes(), 0, most_stages));
    }
    constexpr int64_t shared_bytes(int64_t value_bytes) const {
        const int64_t bytes = stages(value_bytes) * stage_bytes() + bytes_beside_stages(value_bytes);
        return (bytes + 1023) / 1024 * 1024;
    }
    constexpr bool takes(int64_t value_bytes) const { return stages(value_bytes) >= least_stages; }

    // Addresses of 256 rows need more registers than the sums leave.
    constexpr bool gathers() const { return m < 256; }
};

inline constexpr std::array<Tile, 13> tiles{{
    // Most products per byte of shared memory: large layers with many channels.
    {256, 128, Schedule::cooperative},
    {128, 256, Schedule::cooperative},
    {128, 192, Schedule::cooperative},
    {128, 128, Schedule::cooperative},
    // Short reductions, where the epilogue is as long as the products.
    {128, 128, Schedule::pingpong},
    {64, 256, Schedule::pingpong},
    {64, 128, Schedule::pingpong},
    {128, 64, Schedule::pingpong, true},
    {128, 32, Schedule::pingpong, true},
    {64, 64, Schedule::pingpong},
    // Few pixels: a block has only one tile.
    {64, 128, Schedule::single},
    {64, 64, Schedule::single, true, true},
    {64, 32, Schedule::single},
}};

// Replaces a tile that cannot gather where the driver refuses to encode its map.
inline constexpr int gathering_tile = 3;
static_assert(tiles[gathering_tile].gathers());

// How x is copied to shared memory; see producer.cuh.
enum class Fetch : int32_t { tiled, im2col, gather };

constexpr const char* fetch_name(Fetch fetch) {
    constexpr const char* names[] = {"tiled", "im2col", "gather"};
    return names[static_cast<int>(fetch)];
}

struct Choice {
    int tile = 0;  // in tiles
    int stages = 0;
    int split_k = 1;  // blocks of a cluster that share one tile's reduction
    Fetch fetch = Fetch::gather;
    bool takes_any_filter = false;  // with plain addressing, which only the gather has
};

}  // namespace fused_cna::implicit_gemm_sm90
