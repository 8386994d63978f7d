// How depthwise_toeplitz brings its operands: x transposed from neighbouring channels to planes of one channel each, the
// filters as a table of neighbouring taps.
#pragma once

#include <cstdint>
#include <cstring>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "epilogue.cuh"
#include "rows.cuh"

namespace fused_cna::kernels {

inline constexpr int toeplitz_warps = 8, toeplitz_threads = toeplitz_warps * 32;
inline constexpr int toeplitz_blocks_per_multiprocessor = 3;  // that registers allow
inline constexpr int chunk_bytes = 16;

struct ToeplitzArgs {
    ConvArgs conv;
    StripTile tile;
    StripPlanes planes;
    StripMemory memory;
    OutputSize<int> output;
    int slabs, tiles_p, tiles_q;
    int c, h, w, r, s, pad_top, pad_left;
    int filter_rows;  // r, rounded up to whole passes
    bool wide_loads;  // 16 bytes of x, else 4
};

// A strip's place in its tile.
struct Strip {
    int image, down, across;

    static __device__ Strip of(const StripTile& tile, int strip) {
        return {strip / tile.across / tile.down, strip / tile.across % tile.down, strip % tile.across};
    }
};

struct StripBlock {
    int first_image, p, q;  // of its first output pixel
    int first_channel, channels;

    // Slabs run fastest over the grid: blocks that share lines of x and y run together and find them in the L2.
    static __device__ StripBlock of(const ToeplitzArgs& args) {
        int tile = static_cast<int>(device::block_x());
        const int slab = tile % args.slabs;
        tile /= args.slabs;
        const int tile_q = tile % args.tiles_q, tile_p = tile / args.tiles_q % args.tiles_p;
        const int first_channel = slab * StripTile::channels, remaining = args.c - first_channel;
        return {.first_image = tile / args.tiles_q / args.tiles_p * args.tile.images,
                .p = tile_p * args.tile.rows(),
                .q = tile_q * args.tile.columns(),
                .first_channel = first_channel,
                .channels = remaining < StripTile::channels ? remaining : StripTile::channels};
    }

    __device__ Pixel pixel_of_strip(const ToeplitzArgs& args, int strip, int row, int column) const {
        const Strip position = Strip::of(args.tile, strip);
        const Pixel pixel{first_image + position.image, p + position.down * StripTile::strip_rows + row,
                          q + position.across * StripTile::strip_columns + column};
        const bool exists =
            strip < args.tile.strips() && pixel.n < args.output.n && pixel.p < args.output.p && pixel.q < args.output.q;
        return exists ? pixel : Pixel{-1, 0, 0};
    }
};

struct StripTables {
    ChannelFold folds[StripTile::channels];
    uint32_t not_finite[toeplitz_warps];  // the lanes of each warp that met an infinity or a NaN
};
static_assert(sizeof(StripTables) <= StripMemory::tables_bytes, "the tables must fit before the planes");
static_assert(sizeof(RowPlace) == StripMemory::place_bytes, "the plan's shared memory must be the kernel's");

// The parts of a block's shared memory: accumulators and places take over from planes and filter.
struct StripShared {
    StripTables& tables;
    unsigned char* planes;
    uint32_t* filter;
    float* accumulators;
    RowPlace* places;

    static __device__ StripShared of(const ToeplitzArgs& args, unsigned char* memory) {
        unsigned char* operands = memory + StripMemory::tables_bytes;
        return {*reinterpret_cast<StripTables*>(memory), operands, reinterpret_cast<uint32_t*>(memory + args.memory.filter),
                reinterpret_cast<float*>(operands),
                reinterpret_cast<RowPlace*>(operands + StripMemory::accumulator_bytes())};
    }
};

__device__ __forceinline__ int plane_offset(const StripPlanes& planes, int channel) {
    return channel * planes.plane * chunk_bytes + channel / 8 * StripMemory::half_skew;
}

// The first of the two 16-bit values in a word.
template <class T>
__device__ __forceinline__ float first_value(uint32_t word) {
    T value;
    memcpy(&value, &word, sizeof(value));
    return device::to_float(value);
}

__device__ __forceinline__ uint32_t first_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
__device__ __forceinline__ uint32_t second_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

// All bits of both exponents, and their lowest bits.
template <class T>
inline constexpr uint32_t exponents = 0;
template <class T>
inline constexpr uint32_t lowest_exponents = 0;
template <>
inline constexpr uint32_t exponents<device::half> = 0x7C007C00;
template <>
inline constexpr uint32_t lowest_exponents<device::half> = 0x04000400;
template <>
inline constexpr uint32_t exponents<device::bfloat16> = 0x7F807F80;
template <>
inline constexpr uint32_t lowest_exponents<device::bfloat16> = 0x00800080;

inline constexpr uint32_t overflown_exponents = 0x80008000;

// Writes every filter row of the slab as words of two neighbouring taps (s - 1, s), zero where there is no such tap.
template <class T>
__device__ __forceinline__ void stage_filter(const ToeplitzArgs& args, const StripBlock& block, const StripShared& shared) {
    const FilterStrides& strides = args.conv.weight_strides;
    const int words = StripTile::channels * args.filter_rows * StripMemory::filter_row_words;
#pragma unroll 1
    for (int i = device::thread_x(); i < words; i += toeplitz_threads) {
        const int s = i % StripMemory::filter_row_words, row = i / StripMemory::filter_row_words;
        const int channel = row / args.filter_rows, r = row % args.filter_rows;
        T taps[2] = {device::from_float<T>(0.0f), device::from_float<T>(0.0f)};
        if (channel < block.channels && r < args.r) {
            const T* filter_row =
                static_cast<const T*>(args.conv.weight) + (block.first_channel + channel) * strides.k + r * strides.r;
            if (s > 0 && s <= args.s) taps[0] = filter_row[(s - 1) * strides.s];
            if (s < args.s) taps[1] = filter_row[s * strides.s];
        }
        memcpy(&shared.filter[i], taps, sizeof(taps));
    }
}

// Loads 8 neighbouring channels of a pixel, of which the first `valid` exist; the others become zeros.
__device__ __forceinline__ void load_pixel(const char* source, bool wide, int valid, uint32_t (&words)[4]) {
    if (wide) {
        const device::Vector16 chunk = *reinterpret_cast<const device::Vector16*>(source);
#pragma unroll
        for (int k = 0; k < 4; ++k) words[k] = chunk.words[k];
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (2 * k < valid) words[k] = reinterpret_cast<const uint32_t*>(source)[k];
        }
    }
}

// Four neighbouring pixels of one channel.
struct alignas(8) PixelQuad {
    uint32_t words[2];
};

// Stores four pixels of 8 channels into the channels' planes.
__device__ __forceinline__ void store_transposed(const uint32_t (&pixels)[4][4], unsigned char* destination,
                                                 int plane_bytes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        auto* even = reinterpret_cast<PixelQuad*>(destination + 2 * k * plane_bytes);
        auto* odd = reinterpret_cast<PixelQuad*>(destination + (2 * k + 1) * plane_bytes);
        *even = {first_halves(pixels[0][k], pixels[1][k]), first_halves(pixels[2][k], pixels[3][k])};
        *odd = {second_halves(pixels[0][k], pixels[1][k]), second_halves(pixels[2][k], pixels[3][k])};
    }
}

// Brings the block's part of x into the planes, zeros where it is padding. Returns whether this thread saw finite values
// only. A thread takes the same 4 columns and 8 channels of one row after another.
template <class T>
__device__ __forceinline__ bool stage_planes(const ToeplitzArgs& args, const StripBlock& block, const StripShared& shared) {
    constexpr int pixels_per_item = 4, channels_per_item = 8, halves = StripTile::channels / channels_per_item;
    const int quads = args.planes.row * 2;
    const int items_per_row = quads * halves, rows_at_once = toeplitz_threads / items_per_row;
    const int item = device::thread_x() % items_per_row;
    const int first_row = device::thread_x() / items_per_row;
    if (first_row >= rows_at_once) return true;

    const int half = item % halves, column = item / halves * pixels_per_item;
    const int channel = block.first_channel + half * channels_per_item, valid = args.c - channel;
    const int first_w = block.q - args.pad_left + column, first_h = block.p - args.pad_top;
    // Columns that no output needs are left out: they would only cost bandwidth.
    const int needed = block.q - args.pad_left + args.tile.columns() + args.s - 1;
    const int end_w = needed < args.w ? needed : args.w;
    const Strides& strides = args.conv.x_strides;
    unsigned char* destination = shared.planes + plane_offset(args.planes, half * channels_per_item) + column * sizeof(T);

    uint32_t overflown = 0;
    int image = 0;
    for (int row = first_row;; row += rows_at_once) {
        while (row >= args.planes.rows) {
            row -= args.planes.rows;
            ++image;
        }
        if (image >= args.tile.images) break;
        const int n = block.first_image + image, h = first_h + row;
        uint32_t pixels[pixels_per_item][4] = {};
        if (n < args.output.n && h >= 0 && h < args.h && valid > 0) {
            const T* source = static_cast<const T*>(args.conv.x) + n * strides.n + h * strides.h + channel;
#pragma unroll
            for (int i = 0; i < pixels_per_item; ++i) {
                const int w = first_w + i;
                if (w < 0 || w >= end_w) continue;
                load_pixel(reinterpret_cast<const char*>(source + w * strides.w), args.wide_loads, valid, pixels[i]);
            }
        }
#pragma unroll
        for (const auto& pixel : pixels) {
#pragma unroll
            for (const uint32_t word : pixel) overflown |= (word & exponents<T>)+lowest_exponents<T>;
        }
        store_transposed(pixels,
                         destination + (image * args.planes.image + row * args.planes.row +
                                        row / StripTile::strip_rows * args.planes.skew) *
                                           chunk_bytes,
                         args.planes.plane * chunk_bytes);
    }
    return (overflown & overflown_exponents) == 0;
}

}  // namespace fused_cna::kernels
