// The operands of the stem kernel in shared memory: the window of x that a tile reads, the weights as words of the
// reduction, and the table that maps one to the other.
#pragma once

#include <cstring>

#include <device/device.cuh>

#include "kernels/common/output_pixel.cuh"
#include "kernels/common/tf32.cuh"
#include "kernels/stem/tile.h"

namespace fused_cna::stem {

// How the window of x can be read.
enum class Loads : int32_t {
    single,  // value by value: any strides
    planar,  // 16 bytes of each of three channels: dense NCHW
    dense,   // 16 bytes, three channels per pixel: dense NHWC
};

// Values that are the same for all threads, made on the host once per launch.
struct Args {
    ConvArgs conv;
    Loads loads;
    unsigned h, w, c, r, s, dil_h, dil_w;
    int stride_h, stride_w, pad_top, pad_left;
    int p, q, k;
    unsigned tile_p, tile_q;
    unsigned tiles_q, tiles_per_image, tiles_n;
    unsigned tiles, tile_step;  // tiles of pixels; a block takes every tile_step-th
    // As in Layout.
    unsigned filter_rows, chunks;
    unsigned pixel_pitch, lead, words_per_row, words, weight_pitch;
    unsigned row_step, window_rows, window_columns;
    float rows_per_pixel;  // 1 / window_columns
};

template <class T, Tile Of>
struct Traits {
    using Value = T;
    static constexpr Tile tile = Of;
    static constexpr int m = tile.m, n = tile.n, warps = tile.warps, threads = tile.threads();
    static constexpr int fragments_m = m / warps / 16, fragments_n = n / 8;
    static constexpr int channels_per_lane = 8, group = 4 * channels_per_lane, groups = n / group;
    static constexpr int pixels_per_lane = fragments_m * 2, slices = groups * pixels_per_lane;
    static constexpr int values_per_word = 4 / sizeof(T), pixels_per_unit = 16 / sizeof(T);
    static_assert(m == warps * fragments_m * 16, "every warp makes whole fragments of 16 pixels");
    static_assert(n % group == 0, "four lanes store whole groups of channels");
    static_assert(slices <= 8, "take_slice knows eight");
};

// Unsigned: quotients and remainders cost few instructions, and are recomputed rather than kept in registers.
__device__ __forceinline__ unsigned thread() { return static_cast<unsigned>(device::thread_x()); }

struct TileOrigin {
    int64_t n;
    int p, q;

    static __device__ TileOrigin of(const Args& args, unsigned tile) {
        const unsigned within = tile % args.tiles_per_image;
        return {tile / args.tiles_per_image, static_cast<int>(within / args.tiles_q * args.tile_p),
                static_cast<int>(within % args.tiles_q * args.tile_q)};
    }
};

// One pixel of the tile. Offsets in elements from the tile's first pixel.
struct Pixel {
    int64_t y, residual;
    int window;    // in bytes
    int16_t p, q;  // p is -1 where the rectangle has no pixel

    __device__ RowPlace place(const RowPlace& first) const { return {first.y + y, first.residual + residual}; }

    // Whether the pixel exists in the output.
    __device__ bool is_inside(const Args& args, const TileOrigin& origin) const {
        return p >= 0 && origin.p + p < args.p && origin.q + q < args.q;
    }
};

// A lane's words of one MMA in the window, for slots t and t + 4: the offset in bytes from a pixel's first tap, and a mask
// of the bits that are taps.
struct alignas(16) Taps {
    int offset[2];
    uint32_t mask[2];
};

// Shared memory after the tables of fixed size.
template <class T>
struct Operands {
    Taps* taps;
    uint32_t* weights;  // [n][weight_pitch]
    T* window;          // [window_rows][window_columns][pixel_pitch]

    static __device__ Operands at(void* memory, const Args& args, int n) {
        const auto taps = static_cast<Taps*>(memory);
        const auto weights = reinterpret_cast<uint32_t*>(taps + args.words / 2);
        return {taps, weights, reinterpret_cast<T*>(weights + n * args.weight_pitch)};
    }
};

// The window's first pixel in x, on a whole unit; `before` pixels of the window are left of the tile's first tap.
struct Window {
    int h, w, before;

    template <class Traits>
    static __device__ Window of(const Args& args, const TileOrigin& origin, unsigned chunk) {
        const int first_h = origin.p * args.stride_h - args.pad_top, first_w = origin.q * args.stride_w - args.pad_left;
        const int before = first_w & (Traits::pixels_per_unit - 1);
        return {first_h + static_cast<int>(chunk * args.filter_rows * args.dil_h), first_w - before, before};
    }
};

// A pixel of x; is_inside is false in the padding.
struct Source {
    int h, w;
    bool is_inside;

    // The window's i-th pixel. With + 0.5, rounding cannot cross an integer for any window that fits shared memory, so the
    // truncation is exact. It costs a fifth of a division.
    static __device__ __forceinline__ Source of(const Args& args, const Window& first, unsigned i) {
        const auto row = static_cast<unsigned>((static_cast<float>(i) + 0.5f) * args.rows_per_pixel);
        const int left_out = args.stride_h - static_cast<int>(args.row_step);
        int h = first.h + static_cast<int>(row);
        if (left_out > 0) h += static_cast<int>(row / args.row_step) * left_out;
        const int w = first.w + static_cast<int>(i - row * args.window_columns);
        return {h, w, static_cast<unsigned>(h) < args.h && static_cast<unsigned>(w) < args.w};
    }

    template <class T>
    __device__ __forceinline__ const T* in(const T* image, const Strides& strides) const {
        return image + h * strides.h + w * strides.w;
    }
};

template <class Traits>
__device__ void load_single_values(const Args& args, const typename Traits::Value* image, const Window& first,
                                   typename Traits::Value* window) {
    using T = typename Traits::Value;
    const Strides& strides = args.conv.x_strides;
    constexpr unsigned most_channels = 4;
    for (unsigned i = thread(); i < args.window_rows * args.window_columns; i += Traits::threads) {
        const auto source = Source::of(args, first, i);
        const T* channels = source.in(image, strides);
        T values[most_channels];
#pragma unroll
        for (unsigned c = 0; c < most_channels; ++c) {
            values[c] = source.is_inside && c < args.c ? channels[c * strides.c] : device::from_float<T>(0.0f);
        }
#pragma unroll
        for (unsigned c = 0; c < most_channels; ++c) {
            if (c < args.pixel_pitch) window[i * args.pixel_pitch + c] = as_operand(values[c]);
        }
    }
}

// 16 bytes of each of three channels: 8 or 4 neighbouring pixels.
template <class T>
struct Unit {
    static constexpr int pixels = 16 / sizeof(T);
    T values[pixels * 3];  // channel first

    static __device__ __forceinline__ Unit load(const T* source, bool is_planar, int64_t channel_stride) {
        Unit unit;
        const int64_t step = is_planar ? channel_stride : pixels;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const auto piece = *reinterpret_cast<const device::Vector16*>(source + i * step);
            memcpy(unit.values + i * pixels, &piece, sizeof(piece));
        }
        if (!is_planar) return unit;
        Unit transposed;
#pragma unroll
        for (int i = 0; i < pixels * 3; ++i) transposed.values[i] = unit.values[i % 3 * pixels + i / 3];
        return transposed;
    }

    static __device__ __forceinline__ Unit zeros() {
        Unit unit;
#pragma unroll
        for (T& value : unit.values) value = device::from_float<T>(0.0f);
        return unit;
    }

    template <int Pitch>
    __device__ __forceinline__ void store(T* destination) const {
        T padded[pixels * Pitch];
#pragma unroll
        for (int i = 0; i < pixels * Pitch; ++i) {
            padded[i] = i % Pitch < 3 ? as_operand(values[i / Pitch * 3 + i % Pitch]) : device::from_float<T>(0.0f);
        }
#pragma unroll
        for (int i = 0; i < Pitch; ++i) {
            device::Vector16 piece;
            memcpy(&piece, padded + i * pixels, sizeof(piece));
            reinterpret_cast<device::Vector16*>(destination)[i] = piece;
        }
    }
};

// For three channels and rows of whole units: a unit is inside or outside the image, so one test serves 8 or 4 pixels.
template <class Traits>
__device__ void load_units(const Args& args, const typename Traits::Value* image, const Window& first,
                           typename Traits::Value* window) {
    using Unit = Unit<typename Traits::Value>;
    const Strides& strides = args.conv.x_strides;
    const bool is_planar = args.loads == Loads::planar;
    const unsigned pixels = args.window_rows * args.window_columns;
    for (unsigned i = thread() * Unit::pixels; i < pixels; i += Traits::threads * Unit::pixels) {
        const auto source = Source::of(args, first, i);
        const Unit unit = source.is_inside ? Unit::load(source.in(image, strides), is_planar, strides.c) : Unit::zeros();
        if (args.pixel_pitch == 3) {
            unit.template store<3>(window + i * 3);
        } else {
            unit.template store<4>(window + i * 4);
        }
    }
}

// Copies one chunk's window into shared memory, with zeros outside the image.
template <class Traits>
__device__ __forceinline__ void load_window(const Args& args, const TileOrigin& origin, const Window& first,
                                            typename Traits::Value* window) {
    using T = typename Traits::Value;
    const T* image = static_cast<const T*>(args.conv.x) + origin.n * args.conv.x_strides.n;
    if (args.loads == Loads::single) {
        load_single_values<Traits>(args, image, first, window);
    } else {
        load_units<Traits>(args, image, first, window);
    }
}

// A word of the reduction: the weight offsets of its taps, in one output channel, and its place in the window.
template <class T>
struct Word {
    static constexpr int values = 4 / sizeof(T);
    int64_t weight[values];
    bool is_tap[values];
    int window;  // in bytes, from a pixel's first tap
    uint32_t mask;

    static __device__ Word of(const Args& args, unsigned chunk, unsigned word) {
        const unsigned row = word / args.words_per_row, r = chunk * args.filter_rows + row;
        const unsigned first = word % args.words_per_row * values;  // within the run of lead and taps
        const bool row_exists = row < args.filter_rows && r < args.r;
        const FilterStrides& strides = args.conv.weight_strides;
        Word result{.mask = 0};
#pragma unroll
        for (unsigned i = 0; i < values; ++i) {
            // Values of the lead wrap around to beyond any filter.
            const unsigned value = first + i - args.lead;
            const unsigned s = value / args.pixel_pitch, c = value % args.pixel_pitch;
            result.is_tap[i] = row_exists && s < args.s && c < args.c;
            result.weight[i] = result.is_tap[i] ? r * strides.r + s * strides.s + c * strides.c : 0;
            result.mask |= result.is_tap[i] ? (~0u >> (32 - 8 * sizeof(T))) << (i * 8 * sizeof(T)) : 0u;
        }
        // With dilation there is no lead.
        const unsigned in_row = first + first / args.pixel_pitch * args.pixel_pitch * (args.dil_w - 1);
        const unsigned rows = row * args.dil_h * args.window_columns * args.pixel_pitch;
        result.window = result.mask ? static_cast<int>((rows + in_row) * sizeof(T)) : 0;
        return result;
    }
};

// The column whose weights row `row` of shared memory holds. MMA columns are distributed so that a lane's results, two of
// each fragment, are eight neighbouring output channels. The mapping permutes bits, so rows without common bits can be
// mapped separately.
__device__ __forceinline__ unsigned column_of_row(unsigned row) {
    return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

// Packs one chunk's weights into words, with zeros where there is no tap or no output channel, and makes the table of taps.
template <class Traits>
__device__ void load_weights(const Args& args, int first_channel, unsigned chunk,
                             const Operands<typename Traits::Value>& operands) {
    using T = typename Traits::Value;
    // All rows of a word are loaded before any load is waited for, as far as registers allow.
    constexpr unsigned rows_per_warp = Traits::n / Traits::warps, batch = rows_per_warp < 8 ? rows_per_warp : 8;
    static_assert(rows_per_warp % batch == 0, "rows are packed in whole batches");
    const unsigned warp = thread() / 32;
    const int first_of_warp = first_channel + static_cast<int>(column_of_row(warp));
    for (unsigned word = thread() % 32; word < args.words; word += 32) {
        const auto taps = Word<T>::of(args, chunk, word);
        if (warp == 0) {
            Taps& entry = operands.taps[word / 8 * 4 + word % 4];
            entry.offset[word / 4 % 2] = taps.window;
            entry.mask[word / 4 % 2] = taps.mask;
        }
#pragma unroll 1
        for (unsigned first = 0; first < rows_per_warp; first += batch) {
            T values[batch][Word<T>::values];
#pragma unroll
            for (unsigned i = 0; i < batch; ++i) {
                const int channel = first_of_warp + static_cast<int>(column_of_row((first + i) * Traits::warps));
                const T* filter = static_cast<const T*>(args.conv.weight) + channel * args.conv.weight_strides.k;
#pragma unroll
                for (int j = 0; j < Word<T>::values; ++j) {
                    const bool exists = taps.is_tap[j] && channel < args.k;
                    values[i][j] = exists ? filter[taps.weight[j]] : device::from_float<T>(0.0f);
                }
            }
#pragma unroll
            for (unsigned i = 0; i < batch; ++i) {
#pragma unroll
                for (T& value : values[i]) value = as_operand(value);
                uint32_t packed;
                memcpy(&packed, values[i], sizeof(packed));
                operands.weights[((first + i) * Traits::warps + warp) * args.weight_pitch + word] = packed;
            }
        }
    }
}

}  // namespace fused_cna::stem
