// The block and the shared memory of `grouped`, and the copies of its operands.
#pragma once

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/grouped/layout.h"
#include "kernels/grouped/walk.cuh"

namespace fused_cna::grouped {

// The sizes of Layout as 32-bit numbers, and other values that are the same for all threads.
struct Args {
    ConvArgs conv;
    Choice choice;
    int64_t x_n_bytes, x_h_bytes, x_w_bytes;  // strides
    int64_t weight_k_bytes, weight_r_bytes, weight_s_bytes;
    int h, w, p, q, stride_h, stride_w, pad_top, pad_left, dil_h, dil_w, groups, k_per_group;
    int x_vector_bytes, weight_vector_bytes;
    bool taps_dense;      // whether an output channel's weights are contiguous
    bool channels_dense;  // of y
    int halo_rows, halo_columns, row_positions;
    Divisor phases, phase_columns, tap_bytes, s, octets_per_row;
    int pixel_pitch, weight_bytes, weight_pitch, steps, tail_words, pieces, piece_bytes;
    Divisor pixel_sets, units_per_group;
    int slots, threads, columns, staging_pitch;
    Divisor slabs_per_group, slabs, tiles_p, tiles_q;
    int weights_at, offsets_at, columns_at, places_at, folds_at;
    Shares halo_shares;     // pieces of a pixel, positions, rows
    Shares weight_shares;   // pieces of the reduction, columns
    Shares padding_shares;  // words after the reduction, columns; unused where there are none
    Shares output_shares;   // eight columns and slots, the one that is dense in y first
};

// The block's shared memory.
struct Memory {
    unsigned char* halo;     // [row][position] of pixel_pitch bytes
    unsigned char* weights;  // [column] of weight_pitch bytes
    float* staged;           // [slot] of staging_pitch floats, in the operands' memory
    int* offsets;            // of every piece of the reduction, in bytes from an output pixel's first position
    int* columns;            // of the input, by position in a row of the halo; -1 where outside
    RowPlace* places;        // by slot
    ChannelFold* folds;      // by column

    __device__ explicit Memory(const Args& args) {
        unsigned char* first = &device::shared_storage<unsigned char>();
        halo = first;
        weights = first + args.weights_at;
        staged = reinterpret_cast<float*>(first);
        offsets = reinterpret_cast<int*>(first + args.offsets_at);
        columns = reinterpret_cast<int*>(first + args.columns_at);
        places = reinterpret_cast<RowPlace*>(first + args.places_at);
        folds = reinterpret_cast<ChannelFold*>(first + args.folds_at);
    }
};

struct Block {
    int64_t n;
    int first_p, first_q;
    int first_group, groups;
    int columns_per_group;
    int first_channel;  // of the output

    // Slabs of channels vary fastest over the grid: blocks that share pixels run together.
    static __device__ Block of(const Args& args) {
        const int block = static_cast<int>(device::block_x());
        const int slab = args.slabs.remainder(block), tile = args.slabs.quotient(block);
        const int row = args.tiles_q.quotient(tile);
        const int first_group = args.slabs_per_group.quotient(slab) * args.choice.groups;
        const int first_column = args.slabs_per_group.remainder(slab) * args.choice.columns_per_group;
        const int groups = args.groups - first_group, columns = args.k_per_group - first_column;
        return {.n = args.tiles_p.quotient(row),
                .first_p = args.tiles_p.remainder(row) * args.choice.p,
                .first_q = args.tiles_q.remainder(tile) * args.choice.q,
                .first_group = first_group,
                .groups = groups < args.choice.groups ? groups : args.choice.groups,
                .columns_per_group = columns < args.choice.columns_per_group ? columns : args.choice.columns_per_group,
                .first_channel = first_group * args.k_per_group + first_column};
    }

    __device__ int columns() const { return groups * columns_per_group; }
};

// A slot's row and column in the rectangle.
struct SlotPlace {
    int p, q;
    bool exists;
};

__device__ __forceinline__ SlotPlace place_of_slot(const Args& args, int slot) {
    const int p = args.octets_per_row.quotient(slot / octet);
    const int q = args.octets_per_row.remainder(slot / octet) * octet + slot % octet;
    return {p, q, p < args.choice.p && q < args.choice.q};
}

__device__ __forceinline__ Pixel output_pixel(const Args& args, const Block& block, int slot) {
    const SlotPlace place = place_of_slot(args, slot);
    const int p = block.first_p + place.p, q = block.first_q + place.q;
    return {place.exists && p < args.p && q < args.q ? block.n : -1, p, q};
}

// The position of a halo column in its row.
__device__ __forceinline__ int position_of_column(const Args& args, int column) {
    return args.phases.remainder(column) * args.phase_columns.value + args.phases.quotient(column);
}

// Finds the input column of every position of a halo row, or -1.
__device__ __forceinline__ void find_columns(const Args& args, const Block& block, const Memory& memory) {
    const int first_w = block.first_q * args.stride_w - args.pad_left;
#pragma unroll 1
    for (int i = device::thread_x(); i < args.row_positions; i += args.threads) {
        const int column = args.phase_columns.remainder(i) * args.phases.value + args.phase_columns.quotient(i);
        const int w = first_w + column;
        memory.columns[i] = column < args.halo_columns && w >= 0 && w < args.w ? w : -1;
    }
}

// Bytes from an output pixel's first position to a piece (chunk or word) of the reduction. 0 after the last piece.
__device__ __forceinline__ int offset_of_piece(const Args& args, int piece) {
    const int byte = piece * args.piece_bytes;
    if (byte >= args.weight_bytes) return 0;
    const int tap = args.tap_bytes.quotient(byte);
    const int r = args.s.quotient(tap), s = args.s.remainder(tap);
    const int position = r * args.dil_h * args.row_positions + position_of_column(args, s * args.dil_w);
    return position * args.pixel_pitch + args.tap_bytes.remainder(byte);
}

template <int Bytes>
__device__ __forceinline__ void load_halo_by(const Args& args, const Block& block, const Memory& memory) {
    const char* x = static_cast<const char*>(args.conv.x);
    const char* slab = x + block.n * args.x_n_bytes + static_cast<int64_t>(block.first_group) * args.tap_bytes.value;
    const int first_h = block.first_p * args.stride_h - args.pad_top;
    const int bytes = block.groups * args.tap_bytes.value;
    const uint32_t halo = device::shared_address(memory.halo);
#pragma unroll 1
    for (Walk at(args.halo_shares); at.slow < args.halo_rows; at.advance()) {
        const int h = first_h + at.slow, w = memory.columns[at.middle], byte = at.fast * Bytes;
        const bool valid = h >= 0 && h < args.h && w >= 0 && byte < bytes;
        // A copy that reads nothing still needs an aligned address.
        const char* source = valid ? slab + h * args.x_h_bytes + w * args.x_w_bytes + byte : x;
        const int position = at.slow * args.row_positions + at.middle;
        device::copy_async<Bytes>(halo + position * args.pixel_pitch + byte, source, valid);
    }
}

// The halo is zero outside the image.
__device__ __forceinline__ void load_halo(const Args& args, const Block& block, const Memory& memory) {
    switch (args.x_vector_bytes) {
        case 16: return load_halo_by<16>(args, block, memory);
        case 8: return load_halo_by<8>(args, block, memory);
        default: return load_halo_by<4>(args, block, memory);
    }
}

__device__ __forceinline__ int64_t weight_offset(const Args& args, int byte) {
    if (args.taps_dense) return byte;
    const int tap = args.tap_bytes.quotient(byte);
    return args.s.quotient(tap) * args.weight_r_bytes + args.s.remainder(tap) * args.weight_s_bytes +
           args.tap_bytes.remainder(byte);
}

template <int Bytes>
__device__ __forceinline__ void load_weights_by(const Args& args, const Block& block, const Memory& memory) {
    const char* first = static_cast<const char*>(args.conv.weight) + block.first_channel * args.weight_k_bytes;
    const uint32_t weights = device::shared_address(memory.weights);
    const int columns = block.columns();
#pragma unroll 1
    for (Walk at(args.weight_shares); at.middle < columns && at.slow == 0; at.advance()) {
        const int byte = at.fast * Bytes;
        device::copy_async<Bytes>(weights + at.middle * args.weight_pitch + byte,
                                  first + at.middle * args.weight_k_bytes + weight_offset(args, byte), true);
    }
}

// [column][r, s, c], padded with zeros to whole steps.
__device__ __forceinline__ void load_weights(const Args& args, const Block& block, const Memory& memory) {
    switch (args.weight_vector_bytes) {
        case 16: load_weights_by<16>(args, block, memory); break;
        case 8: load_weights_by<8>(args, block, memory); break;
        default: load_weights_by<4>(args, block, memory);
    }
    if (args.tail_words == 8) return;
#pragma unroll 1
    for (Walk at(args.padding_shares); at.slow == 0; at.advance()) {
        unsigned char* column = memory.weights + at.middle * args.weight_pitch;
        *reinterpret_cast<uint32_t*>(column + args.weight_bytes + at.fast * 4) = 0;
    }
}

}  // namespace fused_cna::grouped
