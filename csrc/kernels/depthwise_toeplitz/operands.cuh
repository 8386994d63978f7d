// The operands of depthwise_toeplitz in shared memory: x transposed from neighbouring channels to one plane per channel, the
// filters as the words of Toeplitz matrices.
#pragma once

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/depthwise_toeplitz/layout.h"

namespace fused_cna::depthwise_toeplitz {

inline constexpr int warps = threads / 32;

struct Args {
    ConvArgs conv;
    Choice tile;
    Layout layout;
    OutputSize<int> output;
    int slabs, tiles_p, tiles_q;
    int c, h, w, r, s, pad_top, pad_left;
    int filter_rows;  // r, rounded up to whole passes
    bool wide_loads;  // loads 16 bytes of x at a time, else 4
};

// Where a strip begins: in bytes in a channel's plane, and in the output. n is -1 where the strip does not exist; the kernel
// then reads the first strip.
struct Strip {
    int offset;
    int n, p, q;
};

struct Block {
    int first_image, p, q;  // the block's first output pixel
    int first_channel, channels;

    // Slabs vary fastest over the grid: blocks that share lines of x and y run together and find them in the L2.
    static __device__ Block of(const Args& args) {
        // Unsigned division is shorter.
        unsigned tile = static_cast<unsigned>(device::block_x());
        const unsigned slabs = args.slabs, tiles_p = args.tiles_p, tiles_q = args.tiles_q;
        const int first_channel = static_cast<int>(tile % slabs) * slab_channels, remaining = args.c - first_channel;
        tile /= slabs;
        const unsigned tile_q = tile % tiles_q;
        tile /= tiles_q;
        return {.first_image = static_cast<int>(tile / tiles_p) * args.tile.images,
                .p = static_cast<int>(tile % tiles_p) * args.tile.rows(),
                .q = static_cast<int>(tile_q) * args.tile.columns(),
                .first_channel = first_channel,
                .channels = remaining < slab_channels ? remaining : slab_channels};
    }

    __device__ Strip strip(const Args& args, int index) const {
        if (index >= args.tile.strips()) return {0, -1, 0, 0};
        const int position = index / args.tile.across, n = first_image + position / args.tile.down;
        return {.offset = args.layout.strip_chunk(args.tile, index) * chunk_bytes,
                .n = n < args.output.n ? n : -1,
                .p = p + position % args.tile.down * strip_rows,
                .q = q + index % args.tile.across * strip_columns};
    }
};

struct Tables {
    ChannelFold folds[slab_channels];
    Strip strips[most_strips];
};
static_assert(sizeof(Tables) <= tables_bytes, "the tables must fit before the planes");

// The parts of a block's shared memory; the accumulators reuse the memory of planes and filter.
struct Shared {
    Tables& tables;
    unsigned char* planes;
    uint32_t* filter;
    float* accumulators;

    static __device__ Shared of(const Args& args, unsigned char* memory) {
        unsigned char* operands = memory + tables_bytes;
        return {*reinterpret_cast<Tables*>(memory), operands, reinterpret_cast<uint32_t*>(memory + args.layout.filter_at),
                reinterpret_cast<float*>(operands)};
    }
};

// Byte offsets of a row in its image and of a channel's plane.
__device__ __forceinline__ int row_offset(const Layout& layout, int row) {
    const unsigned skews = static_cast<unsigned>(row) / strip_rows;
    return (row * layout.row + static_cast<int>(skews) * layout.skew) * chunk_bytes;
}

__device__ __forceinline__ int plane_offset(const Layout& layout, int channel) {
    return channel * layout.plane * chunk_bytes + channel / 8 * half_skew;
}

__device__ __forceinline__ uint32_t first_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
__device__ __forceinline__ uint32_t second_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

// A lane's share of the right operand for one filter row, T[j][q] = filter[j - q] with sixteen inputs j and eight outputs q:
// inputs 2t and 2t + 1 of output g, and those 8 further. It depends only on the distance 2t - g, from -7 to 6.
template <class T>
struct alignas(8) Words {
    T values[4];
};

// A filter row of the slab. The constructor starts all its loads; store() writes it as Words by distance, zero where there
// is no tap.
template <class T>
class FilterRow {
    static constexpr int back = farthest_back, widest = widest_filter;

   public:
    __device__ __forceinline__ FilterRow(const Args& args, const Block& block, int row)
        : exists_(row < slab_channels * args.filter_rows) {
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

    __device__ __forceinline__ void store(const Shared& shared, int row) const {
        if (!exists_) return;
        auto* words = reinterpret_cast<Words<T>*>(shared.filter + row * filter_row_pitch);
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

// Stages the rows beyond one per thread, where filters have many rows.
template <class T>
__device__ __forceinline__ void stage_other_rows(const Args& args, const Block& block, const Shared& shared) {
#pragma unroll 1
    for (int row = device::thread_x() + threads; row < slab_channels * args.filter_rows; row += threads) {
        FilterRow<T>(args, block, row).store(shared, row);
    }
}

// A tap, read back from the Words of a filter row.
template <class T>
__device__ __forceinline__ float tap_of_words(const uint32_t* filter_row, int s) {
    const auto* words = reinterpret_cast<const Words<T>*>(filter_row) + farthest_back;
    return device::to_float(s < farthest_back ? words[s].values[0] : words[s - 8].values[2]);
}

// Four neighbouring pixels of one channel.
struct alignas(8) PixelQuad {
    uint32_t words[2];
};

// Stores four pixels of 8 channels into the channels' planes.
__device__ __forceinline__ void store_transposed(const device::Vector16 (&pixels)[4], unsigned char* destination,
                                                 int plane_bytes) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        auto* even = reinterpret_cast<PixelQuad*>(destination + 2 * k * plane_bytes);
        auto* odd = reinterpret_cast<PixelQuad*>(destination + (2 * k + 1) * plane_bytes);
        *even = {first_halves(pixels[0].words[k], pixels[1].words[k]), first_halves(pixels[2].words[k], pixels[3].words[k])};
        *odd = {second_halves(pixels[0].words[k], pixels[1].words[k]),
                second_halves(pixels[2].words[k], pixels[3].words[k])};
    }
}

// Copies the block's part of x into the planes, with zeros for padding. A thread takes the same 4 columns and 8 channels of
// one row after another.
template <class T>
__device__ __forceinline__ void stage_planes(const Args& args, const Block& block, const Shared& shared) {
    constexpr int columns_per_item = 4, channels_per_item = 8, halves = slab_channels / channels_per_item;
    const unsigned items_per_row = args.layout.row * 8 / columns_per_item * halves, thread = device::thread_x();
    const int rows_at_once = static_cast<int>(threads / items_per_row);
    const int item = static_cast<int>(thread % items_per_row), first_row = static_cast<int>(thread / items_per_row);
    if (first_row >= rows_at_once) return;

    const int half = item % halves, column = item / halves * columns_per_item;
    const int channel = block.first_channel + half * channels_per_item, channels = args.c - channel;
    const int first_w = block.q - args.pad_left, first_h = block.p - args.pad_top, w = first_w + column;
    // Columns that no output needs are skipped: they would only cost bandwidth.
    const int needed = first_w + args.tile.columns() + args.s - 1;
    const int end = channels <= 0 ? 0 : needed < args.w ? needed : args.w;

    const Strides& strides = args.conv.x_strides;
    const T* source = static_cast<const T*>(args.conv.x) + channel + w * strides.w;
    unsigned char* destination = shared.planes + plane_offset(args.layout, half * channels_per_item) + column * sizeof(T);

    int image = 0;
    for (int row = first_row;; row += rows_at_once) {
        while (row >= args.layout.rows) {
            row -= args.layout.rows;
            ++image;
        }
        if (image >= args.tile.images) break;
        const int n = block.first_image + image, h = first_h + row;
        device::Vector16 pixels[columns_per_item] = {};
        const auto load = [&]<int Bytes>() {
            const T* pixel = source + n * strides.n + h * strides.h;
#pragma unroll
            for (int i = 0; i < columns_per_item; ++i, pixel += strides.w) {
                if (w + i >= 0 && w + i < end) pixels[i] = device::load_pieces<Bytes>(pixel, channels);
            }
        };
        if (n < args.output.n && h >= 0 && h < args.h) {
            if (args.wide_loads) {
                load.template operator()<16>();
            } else {
                load.template operator()<4>();
            }
        }
        store_transposed(pixels, destination + image * args.layout.image * chunk_bytes + row_offset(args.layout, row),
                         args.layout.plane * chunk_bytes);
    }
}

}  // namespace fused_cna::depthwise_toeplitz
