// How depthwise_toeplitz brings its operands: x transposed from neighbouring channels to planes of one channel each, the
// filters as the words of Toeplitz matrices.
#pragma once

#include <cstdint>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "epilogue.cuh"
#include "rows.cuh"

namespace fused_cna::kernels::depthwise_toeplitz {

inline constexpr int toeplitz_threads = StripTile::threads, toeplitz_warps = toeplitz_threads / 32;
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

// Where a strip begins: in a channel's plane, in bytes, and in the output. n is -1 where there is no such strip; it is then
// read as if it were the first.
struct Strip {
    int offset;
    int n, p, q;
};

struct StripBlock {
    int first_image, p, q;  // of its first output pixel
    int first_channel, channels;

    // Slabs run fastest over the grid: blocks that share lines of x and y run together and find them in the L2.
    static __device__ StripBlock of(const ToeplitzArgs& args) {
        // Unsigned, because that is a shorter division.
        unsigned tile = static_cast<unsigned>(device::block_x());
        const unsigned slabs = args.slabs, tiles_p = args.tiles_p, tiles_q = args.tiles_q;
        const int first_channel = static_cast<int>(tile % slabs) * StripTile::channels, remaining = args.c - first_channel;
        tile /= slabs;
        const unsigned tile_q = tile % tiles_q;
        tile /= tiles_q;
        return {.first_image = static_cast<int>(tile / tiles_p) * args.tile.images,
                .p = static_cast<int>(tile % tiles_p) * args.tile.rows(),
                .q = static_cast<int>(tile_q) * args.tile.columns(),
                .first_channel = first_channel,
                .channels = remaining < StripTile::channels ? remaining : StripTile::channels};
    }

    __device__ Strip strip(const ToeplitzArgs& args, int index) const {
        if (index >= args.tile.strips()) return {0, -1, 0, 0};
        const int position = index / args.tile.across, n = first_image + position / args.tile.down;
        return {.offset = args.planes.strip_chunk(args.tile, index) * chunk_bytes,
                .n = n < args.output.n ? n : -1,
                .p = p + position % args.tile.down * StripTile::strip_rows,
                .q = q + index % args.tile.across * StripTile::strip_columns};
    }
};

struct StripTables {
    ChannelFold folds[StripTile::channels];
    Strip strips[StripTile::most_strips];
};
static_assert(sizeof(StripTables) <= StripMemory::tables_bytes, "the tables must fit before the planes");

// The parts of a block's shared memory: accumulators take over from planes and filter.
struct StripShared {
    StripTables& tables;
    unsigned char* planes;
    uint32_t* filter;
    float* accumulators;

    static __device__ StripShared of(const ToeplitzArgs& args, unsigned char* memory) {
        unsigned char* operands = memory + StripMemory::tables_bytes;
        return {*reinterpret_cast<StripTables*>(memory), operands, reinterpret_cast<uint32_t*>(memory + args.memory.filter),
                reinterpret_cast<float*>(operands)};
    }
};

// Where a row of an image and a channel's plane begin, in bytes.
__device__ __forceinline__ int row_offset(const StripPlanes& planes, int row) {
    const unsigned skews = static_cast<unsigned>(row) / StripTile::strip_rows;
    return (row * planes.row + static_cast<int>(skews) * planes.skew) * chunk_bytes;
}

__device__ __forceinline__ int plane_offset(const StripPlanes& planes, int channel) {
    return channel * planes.plane * chunk_bytes + channel / 8 * StripMemory::half_skew;
}

__device__ __forceinline__ uint32_t first_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
__device__ __forceinline__ uint32_t second_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

// A lane's share of the right operand for one filter row, T[j][q] = filter[j - q] with sixteen inputs j and eight outputs q:
// inputs 2t and 2t + 1 of output g, and those 8 further. It depends on the distance 2t - g alone, from -7 to 6.
template <class T>
struct alignas(8) ToeplitzWords {
    T values[4];
};

// A filter row of the slab: asked for all at once, then written as ToeplitzWords by distance, zero where there is no such
// tap.
template <class T>
class FilterRow {
    static constexpr int back = StripMemory::farthest_back, widest = StripMemory::widest_filter;

   public:
    __device__ __forceinline__ FilterRow(const ToeplitzArgs& args, const StripBlock& block, int row)
        : exists_(row < StripTile::channels * args.filter_rows) {
        const FilterStrides& strides = args.conv.weight_strides;
        const int channel = row / args.filter_rows, r = row % args.filter_rows;
        const bool has_taps = channel < block.channels && r < args.r;
        const T* source =
            static_cast<const T*>(args.conv.weight) + (block.first_channel + channel) * strides.k + r * strides.r;
#pragma unroll
        for (int s = 0; s < widest; ++s) {
            taps_[s] = has_taps && s < args.s ? source[s * strides.s] : device::from_float<T>(0.0f);
        }
    }

    __device__ __forceinline__ void store(const StripShared& shared, int row) const {
        if (!exists_) return;
        auto* words = reinterpret_cast<ToeplitzWords<T>*>(shared.filter + row * StripMemory::filter_row_pitch);
#pragma unroll
        for (int distance = -back; distance < back; ++distance) {
            words[distance + back] = {{tap(distance), tap(distance + 1), tap(distance + 8), tap(distance + 9)}};
        }
    }

   private:
    __device__ __forceinline__ T tap(int s) const { return s >= 0 && s < widest ? taps_[s] : device::from_float<T>(0.0f); }

    bool exists_;
    T taps_[widest];
};

// Those rows of the slab's filters that the threads' first ones leave: of filters with many rows.
template <class T>
__device__ __forceinline__ void stage_other_rows(const ToeplitzArgs& args, const StripBlock& block,
                                                 const StripShared& shared) {
#pragma unroll 1
    for (int row = device::thread_x() + toeplitz_threads; row < StripTile::channels * args.filter_rows;
         row += toeplitz_threads) {
        FilterRow<T>(args, block, row).store(shared, row);
    }
}

// A tap of a filter row in those words.
template <class T>
__device__ __forceinline__ float tap_of_words(const uint32_t* filter_row, int s) {
    const auto* words = reinterpret_cast<const ToeplitzWords<T>*>(filter_row) + StripMemory::farthest_back;
    return device::to_float(s < StripMemory::farthest_back ? words[s].values[0] : words[s - 8].values[2]);
}

// Loads the pixels of an item that lie in columns [0, end) of the image, 8 neighbouring channels of each.
__device__ __forceinline__ void load_wide(const char* source, int64_t step, int column, int end, uint32_t (&pixels)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i, source += step) {
        if (column + i < 0 || column + i >= end) continue;
        const device::Vector16 chunk = *reinterpret_cast<const device::Vector16*>(source);
#pragma unroll
        for (int k = 0; k < 4; ++k) pixels[i][k] = chunk.words[k];
    }
}

// The same by 4 bytes at a time, of the first `channels` only.
__device__ __forceinline__ void load_narrow(const char* source, int64_t step, int column, int end, int channels,
                                            uint32_t (&pixels)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i, source += step) {
        if (column + i < 0 || column + i >= end) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (2 * k < channels) pixels[i][k] = reinterpret_cast<const uint32_t*>(source)[k];
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

// Brings the block's part of x into the planes, zeros where it is padding. A thread takes the same 4 columns and 8 channels
// of one row after another.
template <class T>
__device__ __forceinline__ void stage_planes(const ToeplitzArgs& args, const StripBlock& block, const StripShared& shared) {
    constexpr int columns_per_item = 4, channels_per_item = 8, halves = StripTile::channels / channels_per_item;
    const unsigned items_per_row = args.planes.row * 8 / columns_per_item * halves, thread = device::thread_x();
    const int rows_at_once = static_cast<int>(toeplitz_threads / items_per_row);
    const int item = static_cast<int>(thread % items_per_row), first_row = static_cast<int>(thread / items_per_row);
    if (first_row >= rows_at_once) return;

    const int half = item % halves, column = item / halves * columns_per_item;
    const int channel = block.first_channel + half * channels_per_item, channels = args.c - channel;
    const int first_w = block.q - args.pad_left, first_h = block.p - args.pad_top, w = first_w + column;
    // Columns that no output needs are left out: they would only cost bandwidth.
    const int needed = first_w + args.tile.columns() + args.s - 1;
    const int end = channels <= 0 ? 0 : needed < args.w ? needed : args.w;

    const Strides& strides = args.conv.x_strides;
    const int64_t pixel_step = strides.w * static_cast<int64_t>(sizeof(T));
    const auto* source = static_cast<const char*>(args.conv.x) + (channel + w * strides.w) * static_cast<int64_t>(sizeof(T));
    unsigned char* destination = shared.planes + plane_offset(args.planes, half * channels_per_item) + column * sizeof(T);

    int image = 0;
    for (int row = first_row;; row += rows_at_once) {
        while (row >= args.planes.rows) {
            row -= args.planes.rows;
            ++image;
        }
        if (image >= args.tile.images) break;
        const int n = block.first_image + image, h = first_h + row;
        uint32_t pixels[columns_per_item][4] = {};
        if (n < args.output.n && h >= 0 && h < args.h) {
            const char* pixel = source + (n * strides.n + h * strides.h) * static_cast<int64_t>(sizeof(T));
            if (args.wide_loads) {
                load_wide(pixel, pixel_step, w, end, pixels);
            } else {
                load_narrow(pixel, pixel_step, w, end, channels, pixels);
            }
        }
        store_transposed(pixels, destination + image * args.planes.image * chunk_bytes + row_offset(args.planes, row),
                         args.planes.plane * chunk_bytes);
    }
}

}  // namespace fused_cna::kernels::depthwise_toeplitz
