// What the stem kernel brings into shared memory: the window of x that a tile reads, the weights as words of the reduction,
// and the table that leads from one to the other.
#pragma once

#include <cstdint>
#include <cstring>

#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "../tiles.h"

namespace fused_cna::kernels {

// How x allows its window to be read.
enum class StemLoads : int32_t {
    single,  // value by value: any strides
    planar,  // 16 bytes of each of three channels: dense NCHW
    dense,   // 16 bytes, three channels a pixel: dense NHWC
};

// Everything that is the same for all threads, made on the host once per launch.
struct StemArgs {
    ConvArgs conv;
    StemLoads loads;
    int h, w, c, r, s;
    int stride_h, stride_w, pad_top, pad_left, dil_h, dil_w;
    int p, q, k;
    int tile_p, tile_q;
    int tiles_q, tiles_per_image, tiles_n;
    int tiles, tile_step;  // of pixels; a block takes every tile_step-th
    // As in StemGeometry.
    int filter_rows, chunks;
    int pixel_pitch, lead, words_per_row, words, weight_pitch;
    int row_step, window_rows, window_columns;
};

template <class T, StemTile Tile>
struct StemTraits {
    using Value = T;
    static constexpr StemTile tile = Tile;
    static constexpr int m = tile.m, n = tile.n, warps = tile.warps, threads = tile.threads();
    static constexpr int fragments_m = m / warps / 16, fragments_n = n / 8;
    static constexpr int channels_per_lane = 8, group = 4 * channels_per_lane, groups = n / group;
    static constexpr int pixels_per_lane = fragments_m * 2, slices = groups * pixels_per_lane;
    static constexpr int values_per_word = 4 / sizeof(T), pixels_per_unit = 16 / sizeof(T);
    static_assert(m == warps * fragments_m * 16, "every warp makes whole fragments of 16 pixels");
    static_assert(n % group == 0, "four lanes store whole groups of channels");
    static_assert(slices <= 8, "take_slice knows eight");
};

// One pixel of the tile: offsets in elements, from the tile's first pixel.
struct StemPixel {
    int64_t y, residual;
    int window;    // in bytes
    int16_t p, q;  // p is -1 where the rectangle has no such pixel
};

// Where a lane finds its words of one MMA in the window, those of slots t and t + 4: the distance in bytes from a pixel's
// first tap, and the bits that are taps.
struct alignas(16) StemTaps {
    int offset[2];
    uint32_t mask[2];
};

struct StemTileOrigin {
    int64_t n;
    int p, q;

    static __device__ StemTileOrigin of(const StemArgs& args, int tile) {
        const int within = tile % args.tiles_per_image;
        return {tile / args.tiles_per_image, within / args.tiles_q * args.tile_p, within % args.tiles_q * args.tile_q};
    }
};

// What lies in shared memory behind the tables of fixed size.
template <class T>
struct StemOperands {
    StemTaps* taps;
    uint32_t* weights;  // [n][weight_pitch]
    T* window;          // [window_rows][window_columns][pixel_pitch]

    static __device__ StemOperands at(void* memory, const StemArgs& args, int n) {
        const auto taps = static_cast<StemTaps*>(memory);
        const auto weights = reinterpret_cast<uint32_t*>(taps + args.words / 2);
        return {taps, weights, reinterpret_cast<T*>(weights + n * args.weight_pitch)};
    }
};

// Tensor cores would truncate float32, which biases every product the same way.
template <class T>
__device__ __forceinline__ T as_operand(T value) {
    if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        bits = device::round_to_tf32(bits);
        memcpy(&value, &bits, sizeof(bits));
    }
    return value;
}

// The window's first pixel in x, on a whole unit; `before` pixels of it lie left of the tile's first tap.
struct StemWindow {
    int h, w, before;

    template <class Traits>
    static __device__ StemWindow of(const StemArgs& args, const StemTileOrigin& origin, int chunk) {
        const int first_w = origin.q * args.stride_w - args.pad_left;
        const int before = first_w & (Traits::pixels_per_unit - 1);
        return {origin.p * args.stride_h - args.pad_top + chunk * args.filter_rows * args.dil_h, first_w - before, before};
    }

    // The row of x that a row of the window holds.
    __device__ int64_t row_of_x(const StemArgs& args, int row) const {
        return static_cast<int64_t>(h) + row + static_cast<int64_t>(row / args.row_step) * (args.stride_h - args.row_step);
    }
};

__device__ __forceinline__ bool is_inside(const StemArgs& args, int64_t h, int w) {
    return h >= 0 && h < args.h && w >= 0 && w < args.w;
}

template <class Traits>
__device__ void load_single_values(const StemArgs& args, const typename Traits::Value* image, const StemWindow& first,
                                   typename Traits::Value* window) {
    using T = typename Traits::Value;
    const Strides& strides = args.conv.x_strides;
    constexpr int most_channels = 4;
    for (int i = device::thread_x(); i < args.window_rows * args.window_columns; i += Traits::threads) {
        const int64_t h = first.row_of_x(args, i / args.window_columns);
        const int w = first.w + i % args.window_columns;
        const bool inside = is_inside(args, h, w);
        const T* source = image + h * strides.h + w * strides.w;
        T values[most_channels];
#pragma unroll
        for (int c = 0; c < most_channels; ++c) {
            values[c] = inside && c < args.c ? source[c * strides.c] : device::from_float<T>(0.0f);
        }
#pragma unroll
        for (int c = 0; c < most_channels; ++c) {
            if (c < args.pixel_pitch) window[i * args.pixel_pitch + c] = as_operand(values[c]);
        }
    }
}

// A unit's three channels, 16 bytes of each, as pixels.
template <class T, StemLoads Loads>
__device__ __forceinline__ void load_unit(const T* source, int64_t channel_stride, T (&pixels)[16 / sizeof(T)][3]) {
    constexpr int per_vector = 16 / sizeof(T);
    T parts[3 * per_vector];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const T* piece = source + i * (Loads == StemLoads::planar ? channel_stride : per_vector);
        const device::Vector16 vector = *reinterpret_cast<const device::Vector16*>(piece);
        memcpy(parts + i * per_vector, &vector, sizeof(vector));
    }
#pragma unroll
    for (int i = 0; i < 3 * per_vector; ++i) {
        if constexpr (Loads == StemLoads::planar) {
            pixels[i % per_vector][i / per_vector] = parts[i];
        } else {
            pixels[i / 3][i % 3] = parts[i];
        }
    }
}

template <class T, int Pitch>
__device__ __forceinline__ void store_unit(const T (&pixels)[16 / sizeof(T)][3], T* destination) {
    constexpr int per_vector = 16 / sizeof(T);
    T parts[per_vector * Pitch];
#pragma unroll
    for (int i = 0; i < per_vector * Pitch; ++i) {
        parts[i] = i % Pitch < 3 ? as_operand(pixels[i / Pitch][i % Pitch]) : device::from_float<T>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < Pitch; ++i) {
        device::Vector16 vector;
        memcpy(&vector, parts + i * per_vector, sizeof(vector));
        reinterpret_cast<device::Vector16*>(destination)[i] = vector;
    }
}

// Three channels, in rows of whole units: each lies inside the image or outside, so one test serves 8 or 4 pixels.
template <class Traits, StemLoads Loads, int Pitch>
__device__ void load_units(const StemArgs& args, const typename Traits::Value* image, const StemWindow& first,
                           typename Traits::Value* window) {
    using T = typename Traits::Value;
    constexpr int pixels_per_unit = Traits::pixels_per_unit;
    const Strides& strides = args.conv.x_strides;
    const int units_per_row = args.window_columns / pixels_per_unit;
    for (int i = device::thread_x(); i < args.window_rows * units_per_row; i += Traits::threads) {
        const int64_t h = first.row_of_x(args, i / units_per_row);
        const int w = first.w + i % units_per_row * pixels_per_unit;
        T pixels[pixels_per_unit][3];
        if (is_inside(args, h, w)) {
            load_unit<T, Loads>(image + h * strides.h + w * strides.w, strides.c, pixels);
        } else {
#pragma unroll
            for (int j = 0; j < pixels_per_unit * 3; ++j) pixels[j / 3][j % 3] = device::from_float<T>(0.0f);
        }
        store_unit<T, Pitch>(pixels, window + i * pixels_per_unit * Pitch);
    }
}

// Brings one chunk's window into shared memory, with zeros outside the image.
template <class Traits>
__device__ __forceinline__ void load_window(const StemArgs& args, const StemTileOrigin& origin, const StemWindow& first,
                                            typename Traits::Value* window) {
    using T = typename Traits::Value;
    const T* image = static_cast<const T*>(args.conv.x) + origin.n * args.conv.x_strides.n;
    const bool padded = args.pixel_pitch == 4;
    if (args.loads == StemLoads::single) {
        load_single_values<Traits>(args, image, first, window);
    } else if (args.loads == StemLoads::planar) {
        padded ? load_units<Traits, StemLoads::planar, 4>(args, image, first, window)
               : load_units<Traits, StemLoads::planar, 3>(args, image, first, window);
    } else {
        padded ? load_units<Traits, StemLoads::dense, 4>(args, image, first, window)
               : load_units<Traits, StemLoads::dense, 3>(args, image, first, window);
    }
}

// A word of the reduction: the taps that its values are, as offsets in the weight of one output channel, and where the
// window holds them.
template <class T>
struct StemWord {
    static constexpr int values = 4 / sizeof(T);
    int64_t weight[values];
    bool is_tap[values];
    int window;  // in bytes, from a pixel's first tap
    uint32_t mask;

    static __device__ StemWord of(const StemArgs& args, int chunk, int word) {
        const int row = word / args.words_per_row;
        const int r = chunk * args.filter_rows + row;
        const bool row_exists = row < args.filter_rows && r < args.r;
        const int first = word % args.words_per_row * values - args.lead;
        const FilterStrides& strides = args.conv.weight_strides;
        StemWord result{.mask = 0};
#pragma unroll
        for (int i = 0; i < values; ++i) {
            // The lead is at most one value, so the division of -1 below rounds to tap 0 of a value that is none.
            const int s = (first + i) / args.pixel_pitch, c = first + i - s * args.pixel_pitch;
            result.is_tap[i] = row_exists && s < args.s && c >= 0 && c < args.c;
            result.weight[i] = r * strides.r + s * strides.s + c * strides.c;
            result.mask |= result.is_tap[i] ? (~0u >> (32 - 8 * sizeof(T))) << (i * 8 * sizeof(T)) : 0u;
        }
        const int before = first / args.pixel_pitch * (args.dil_w - 1) * args.pixel_pitch + first + args.lead;
        const int row_pitch = args.window_columns * args.pixel_pitch;
        result.window = result.mask ? (row * args.dil_h * row_pitch + before) * static_cast<int>(sizeof(T)) : 0;
        return result;
    }
};

// The column whose weights a row of shared memory holds. MMA columns are dealt out so that a lane's results, two of each
// fragment, are eight neighbouring output channels.
__device__ __forceinline__ int column_of_row(int row) {
    return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

// Packs one chunk's weights into words, zeros where there is no tap or no output channel, and makes the table of taps.
template <class Traits>
__device__ void load_weights(const StemArgs& args, int first_channel, int chunk,
                             const StemOperands<typename Traits::Value>& operands) {
    using T = typename Traits::Value;
    constexpr int rows_per_warp = Traits::n / Traits::warps;
    for (int word = device::lane(); word < args.words; word += 32) {
        const auto taps = StemWord<T>::of(args, chunk, word);
        if (device::warp() == 0) {
            StemTaps& entry = operands.taps[word / 8 * 4 + word % 4];
            entry.offset[word / 4 % 2] = taps.window;
            entry.mask[word / 4 % 2] = taps.mask;
        }
#pragma unroll 4
        for (int i = 0; i < rows_per_warp; ++i) {
            const int row = device::warp() + i * Traits::warps, channel = first_channel + column_of_row(row);
            const T* filter = static_cast<const T*>(args.conv.weight) + channel * args.conv.weight_strides.k;
            T values[StemWord<T>::values];
#pragma unroll
            for (int j = 0; j < StemWord<T>::values; ++j) {
                const bool exists = taps.is_tap[j] && channel < args.k;
                values[j] = exists ? as_operand(filter[taps.weight[j]]) : device::from_float<T>(0.0f);
            }
            uint32_t packed;
            memcpy(&packed, values, sizeof(packed));
            operands.weights[row * args.weight_pitch + word] = packed;
        }
    }
}

}  // namespace fused_cna::kernels
