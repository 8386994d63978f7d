// The operands of the Hopper kernel: its traits, a block's tiles, and the bulk copies of a step's operands.
#pragma once

#include <device/hopper.cuh>

#include "kernels/common/gather.cuh"
#include "kernels/implicit_gemm_sm90/tile.h"

namespace fused_cna::implicit_gemm_sm90 {

// Like gather::Args: made on the host once per launch.
struct Args : gather::Args {
    device::TensorMap x_map, weight_map, residual_map, y_map;
    bool x_by_map, x_is_tiled, weight_by_map, residual_by_map, y_by_map;  // else value by value, or by the gather
    Divisor tiles_per_group;                                              // tiles of columns
    int tiles, tile_step;                                                 // step between the tiles of a block, or cluster
    Divisor band, last_band;  // columns of tiles per band, and in the last band, which may have fewer
    Divisor band_tiles;       // tiles per band
    Divisor split;            // blocks that share a tile
    int bands, steps_per_split;
};

template <class T, Tile Of, int VectorBytes>
struct Traits : gather::Shape<T, Of.m, Of.n, Tile::k_bytes, 128, VectorBytes> {
    using Value = T;
    static constexpr Tile tile = Of;
    static constexpr int m = tile.m, n = tile.n, consumers = tile.consumers();
    static constexpr int block_threads = tile.threads(), stages = tile.stages(sizeof(T));
    static constexpr bool is_pingpong = tile.schedule == Schedule::pingpong;
    static constexpr int k_steps = Tile::k_bytes / 32;  // per stage: one product takes 32 bytes of each row

    // A consumer warpgroup's rows, in blocks of 64 (the rows of one wgmma), and columns, in slices. A thread has 16 sums in
    // a slice of a block, and finishes 8 at a time.
    static constexpr int rows = tile.rows_of_consumer(), blocks = rows / 64, slices = n / Tile::slice;
    static constexpr int slice_row_bytes = Tile::slice * sizeof(T), slice_bytes = rows * slice_row_bytes;

    // wgmma would truncate float32 operands, so they are rounded in shared memory first.
    static constexpr bool rounds = sizeof(T) == 4;

    // Registers per thread of a producer and of a consumer; a block starts with 168 for each. A gather keeps four for each
    // of the thread's rows.
    static constexpr int copying_registers = tile.gathers() ? m == 64 ? 72 : 88 : 40;
    static constexpr int multiplying_registers = (3 * 168 - copying_registers) / 2 / 8 * 8;

    static_assert(rows % 64 == 0 && n % Tile::slice == 0 && n <= 256, "what wgmma multiplies");
    static_assert(blocks * n <= 256, "sums take 128 registers of a thread at most");
    static_assert(!rounds || tile.gathers(), "who gathers a chunk rounds it");
    static_assert(stages >= Tile::least_stages, "one stage is multiplied, one is done with, one is filled");
};

// Tiles are numbered in bands of columns; within a band, columns vary fastest. So blocks that run together share rows of x
// and columns of the weight, and find both in the L2.
template <class Traits>
__device__ __forceinline__ gather::Block block_of_tile(const Args& args, int tile) {
    const int band = args.band_tiles.quotient(tile), within = args.band_tiles.remainder(tile);
    const Divisor& width = band + 1 < args.bands ? args.band : args.last_band;
    const int tile_m = width.quotient(within), tile_n = band * args.band.value + width.remainder(within);
    const int first_column = args.tiles_per_group.remainder(tile_n) * Traits::n;
    const int remaining = args.k_per_group - first_column;
    return {.first_row = tile_m * Traits::m,
            .group = args.tiles_per_group.quotient(tile_n),
            .first_column = first_column,
            .columns = remaining < Traits::n ? remaining : Traits::n};
}

// The block's share of its tiles' reduction: all of it, or a part where the blocks of a cluster share it.
struct Steps {
    int first, count;

    static __device__ Steps of(const Args& args) {
        if (args.split.value == 1) return {0, args.steps};
        const int first = device::cluster_rank() * args.steps_per_split, remaining = args.steps - first;
        return {first, remaining < args.steps_per_split ? remaining : args.steps_per_split};
    }
};

// The tiles of a block: the one with its number (or its cluster's), then every tile_step-th.
struct TileWalk {
    int tile, step;

    static __device__ TileWalk of(const Args& args) {
        return {args.split.quotient(static_cast<int>(device::block_x())), args.tile_step};
    }
    __device__ bool is_inside(const Args& args) const { return tile < args.tiles; }
    __device__ void next() { tile += step; }
};

// The next stage, and the parity of its barriers' phase.
template <int Stages>
struct Ring {
    int stage = 0, parity = 0;

    __device__ void next() { skip(1); }
    __device__ void skip(int steps) {
        stage += steps;
        parity ^= stage / Stages & 1;
        stage %= Stages;
    }
};

// Bulk copies of the operands of successive steps, all started by one thread.
template <class Traits>
class MapLoader {
   public:
    __device__ MapLoader(const Args& args, const gather::Block& block, int first_step) : args_(args) {
        const int tap = args.channel_steps.quotient(first_step);
        c_ = args.channel_steps.remainder(first_step) * Traits::k;
        r_ = args.x.s.quotient(tap);
        s_ = args.x.s.remainder(tap);
        first_channel_ = block.group * args.c_per_group;
        first_filter_ = block.first_channel(args);
        first_row_ = block.first_row;
        const Pixel pixel = args.x.output.pixel_of_row(block.first_row);
        n_ = static_cast<int>(pixel.n);
        h_ = pixel.p * args.x.stride_h - args.x.pad_top;
        w_ = pixel.q * args.x.stride_w - args.x.pad_left;
    }

    // The bytes of a step's copies.
    static __device__ int step_bytes(const Args& args) {
        return (args.x_by_map ? Traits::m * Traits::row_bytes : 0) +
               (args.weight_by_map ? Traits::n * Traits::row_bytes : 0);
    }

    __device__ __forceinline__ void load(uint32_t stage, device::PhaseBarrier& barrier) {
        if (args_.x_by_map) load_x(stage, barrier);
        if (args_.weight_by_map) {
            device::load_tile(stage + Traits::weight_start, args_.weight_map, barrier, c_, s_, r_, first_filter_);
        }
        advance();
    }

   private:
    __device__ __forceinline__ void load_x(uint32_t stage, device::PhaseBarrier& barrier) {
        if (args_.x_is_tiled) {
            device::load_tile(stage, args_.x_map, barrier, first_channel_ + c_, first_row_);
        } else {
            device::load_im2col(stage, args_.x_map, barrier, first_channel_ + c_, w_, h_, n_, s_ * args_.x.dil_w.value,
                                r_ * args_.x.dil_h.value);
        }
    }

    __device__ __forceinline__ void advance() {
        c_ += Traits::k;
        if (c_ < args_.c_per_group) return;
        c_ = 0;
        if (++s_ <= args_.last_s) return;
        s_ = 0;
        ++r_;
    }

    const Args& args_;
    int r_, s_, c_;  // tap and channel of the next step
    int first_channel_, first_filter_, first_row_;
    int n_, h_, w_;  // the first row's pixel under tap (0, 0)
};

}  // namespace fused_cna::implicit_gemm_sm90
