// Convolution in groups of few channels on tensor cores. A block copies the halo, the input that a rectangle of output
// pixels reads, into shared memory once for several neighbouring groups, and those groups' weights; mma.sync reads its
// operands straight from the halo. float16, bfloat16, and float32 rounded to tf32; compute capability 8.0 and newer.
// Channels of x and of the weight must be dense, a group's a whole number of 4-byte words.
#pragma once

#include <type_traits>

#include <device/device.cuh>

#include "kernels/common/start.cuh"
#include "kernels/common/tf32.cuh"
#include "kernels/grouped/fragments.cuh"

namespace fused_cna::grouped {

template <class T, Tile Of>
struct Traits {
    using Value = T;
    static constexpr Tile tile = Of;
    static constexpr int fragments = tile.fragments, column_blocks = tile.column_blocks;
    using XReader = std::conditional_t<tile.reader == Reader::chunks, ChunkReader<fragments>, WordReader<fragments>>;
    static_assert(XReader::offsets_per_step == offsets_per_step(tile.reader), "the plan's table must be the kernel's");
    static_assert(sizeof(RowPlace) == bytes_per_place && sizeof(ChannelFold) == bytes_per_fold,
                  "the plan's tables must be the kernel's");
};

template <class Traits>
using Accumulators = float[Traits::fragments][Traits::column_blocks][4];

// A warp's share of its block: one set of pixel slots x one unit of columns.
struct Warp {
    int first_slot;
    int group;                  // index within the block
    int first_column, columns;  // the first of the group's columns in this block; how many exist

    template <class Traits>
    static __device__ Warp of(const Args& args, const Block& block) {
        const int set = args.pixel_sets.remainder(device::warp()), unit = args.pixel_sets.quotient(device::warp());
        const int group = args.units_per_group.quotient(unit);
        const int first_column = args.units_per_group.remainder(unit) * Traits::tile.columns();
        const int remaining = group < block.groups ? block.columns_per_group - first_column : 0;
        return {set * Traits::tile.slots(), group, first_column,
                remaining < Traits::tile.columns() ? remaining : Traits::tile.columns()};
    }

    // False where the last block has fewer groups or columns than the others.
    __device__ bool exists() const { return columns > 0; }
    __device__ int first_column_of_block(const Block& block) const { return group * block.columns_per_group + first_column; }
};

__device__ __forceinline__ void prepare_places(const Args& args, const Block& block, const Memory& memory) {
    // Rolled: to unroll it the compiler would divide by the number of threads to count the turns.
#pragma unroll 1
    for (int i = device::thread_x(); i < args.pieces; i += args.threads) memory.offsets[i] = offset_of_piece(args, i);
#pragma unroll 1
    for (int i = device::thread_x(); i < args.slots; i += args.threads) {
        memory.places[i] = place_of_pixel(args.conv, output_pixel(args, block, i));
    }
}

template <class Traits>
__device__ __forceinline__ void accumulate(const Args& args, const Block& block, const Warp& warp, const Memory& memory,
                                           Accumulators<Traits>& total) {
    using T = typename Traits::Value;
    typename Traits::XReader x(args, memory, warp.first_slot, warp.group * args.tap_bytes.value);
    WeightReader<Traits::column_blocks> weight(args, memory, warp.first_column_of_block(block), warp.columns);
#pragma unroll 1
    for (int step = 0; step < args.steps; ++step) {
        uint32_t x_words[Traits::fragments][4], weight_words[Traits::column_blocks][2];
        x.read(x_words);
        weight.read(weight_words);
        if (step + 1 == args.steps) clear_tail(args.tail_words, x_words);
        if constexpr (sizeof(T) == 4) {
            round_to_tf32(x_words);
            round_to_tf32(weight_words);
        }
#pragma unroll
        for (int i = 0; i < Traits::fragments; ++i) {
#pragma unroll
            for (int j = 0; j < Traits::column_blocks; ++j) {
                device::multiply_add<T>(total[i][j], x_words[i], weight_words[j]);
            }
        }
    }
}

// Writes a warp's accumulators to memory.staged, [slot][column].
template <class Traits>
__device__ __forceinline__ void stage_accumulators(const Args& args, const Block& block, const Warp& warp,
                                                   const Memory& memory, const Accumulators<Traits>& total) {
    const int row = device::lane() / 4, column = device::lane() % 4 * 2;
    float* first = memory.staged + (warp.first_slot + row) * args.staging_pitch + warp.first_column_of_block(block) + column;
    // With an odd number of columns, groups start at odd addresses.
    const bool in_pairs = block.columns_per_group % 2 == 0;
#pragma unroll
    for (int i = 0; i < Traits::fragments * 2; ++i) {
        float* slot = first + i * 8 * args.staging_pitch;
#pragma unroll
        for (int j = 0; j < Traits::column_blocks; ++j) {
            const float* pair = &total[i / 2][j][i % 2 * 2];
            const int remaining = warp.columns - j * 8 - column;
            if (in_pairs) {
                if (remaining > 0) device::store_pair(slot + j * 8, pair[0], pair[1]);
            } else {
                if (remaining > 0) slot[j * 8] = pair[0];
                if (remaining > 1) slot[j * 8 + 1] = pair[1];
            }
        }
    }
}

// Prefetches the residual into the L2 while the main loop runs.
template <class T>
__device__ __forceinline__ void prefetch_residual(const Args& args, const Block& block, const Memory& memory) {
#pragma unroll 1
    for (Walk at(args.output_shares); at.slow == 0; at.advance()) {
        const int piece = args.channels_dense ? at.fast : at.middle, slot = args.channels_dense ? at.middle : at.fast;
        const RowPlace& place = memory.places[slot];
        if (!place.exists() || piece * 8 >= block.columns()) continue;
        prefetch_pixel_residual<T>(args.conv, place, block.first_channel + piece * 8);
    }
}

// Finishes and stores the block's outputs from the staged accumulators, eight columns at a time, in a rolled loop.
template <class T>
__device__ __forceinline__ void store_outputs(const Args& args, const Block& block, const Memory& memory) {
    constexpr int width = 8;
    const int columns = block.columns();
    // Most threads keep their columns from turn to turn; they need not read the folds again.
    ChannelFold folds[width];
    int folds_of = -1;
#pragma unroll 1
    for (Walk at(args.output_shares); at.slow == 0; at.advance()) {
        const int piece = args.channels_dense ? at.fast : at.middle, slot = args.channels_dense ? at.middle : at.fast;
        const RowPlace& place = memory.places[slot];
        const int column = piece * width, remaining = columns - column;
        if (!place.exists() || remaining <= 0) continue;
        if (piece != folds_of) {
#pragma unroll
            for (int i = 0; i < width; ++i) folds[i] = memory.folds[column + i];
            folds_of = piece;
        }
        float values[width];
        device::load_vector(memory.staged + slot * args.staging_pitch + column, values);
        finish_channels<width, T>(values, folds, args.conv, place, block.first_channel + column,
                                  remaining < width ? remaining : width);
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::tile.most_threads, Traits::tile.blocks_per_multiprocessor)
    grouped(const __grid_constant__ Args args) {
    using T = typename Traits::Value;
    const Memory memory(args);
    const Block block = Block::of(args);
    if constexpr (prepares_ahead) prepare_places(args, block, memory);
    await_kernels_ahead(args.conv, args.threads);
    load_weights(args, block, memory);
    find_columns(args, block, memory);
    device::sync_threads();
    load_halo(args, block, memory);
    device::commit_copies();
    // The block has a thread for every column, including the padding to a multiple of eight.
    const FoldTable<T> folds(args.conv.epilogue, block.first_channel, (args.columns + 7) / 8 * 8, block.columns());
    if constexpr (!prepares_ahead) prepare_places(args, block, memory);
    folds.store(memory.folds);
    device::wait_copies<0>();
    device::sync_threads();

    if (args.conv.residual) prefetch_residual<T>(args, block, memory);
    const Warp warp = Warp::of<Traits>(args, block);
    Accumulators<Traits> total = {};
    if (warp.exists()) accumulate<Traits>(args, block, warp, memory, total);

    // The staged accumulators reuse the operands' memory.
    device::sync_threads();
    if (warp.exists()) stage_accumulators<Traits>(args, block, warp, memory, total);
    device::sync_threads();
    store_outputs<T>(args, block, memory);
}

}  // namespace fused_cna::grouped
