// The first layer of a network, four input channels or fewer, on tensor cores. Reads x in any layout, NCHW too. float16,
// bfloat16, and float32 rounded to tf32; compute capability 8.0 and newer.
//
// A block computes rectangles of output pixels of one image, one after the other. It copies the window of x that a rectangle
// reads into shared memory; each lane gathers its fragments of the left matrix from there, so that matrix exists only in
// registers. Every warp computes its pixels in all of the block's channels, so each value is gathered once.
#pragma once

#include <cstring>

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/common/start.cuh"
#include "kernels/stem/operands.cuh"

namespace fused_cna::stem {

template <class Traits>
struct Shared {
    alignas(16) ChannelFold folds[Traits::n];
    alignas(16) Pixel pixels[Traits::m];
    static_assert(sizeof(ChannelFold) * Traits::n + sizeof(Pixel) * Traits::m == Traits::tile.table_bytes(),
                  "the plan's shared memory must be the kernel's");
};

template <class Traits>
__device__ void prepare_pixels(const Args& args, Shared<Traits>& shared) {
    using T = typename Traits::Value;
    const unsigned pixel_bytes = args.pixel_pitch * sizeof(T);
    const unsigned p_bytes = args.row_step * args.window_columns * pixel_bytes,
                   q_bytes = static_cast<unsigned>(args.stride_w) * pixel_bytes;
    for (unsigned i = thread(); i < Traits::m; i += Traits::threads) {
        const unsigned p = i / args.tile_q, q = i % args.tile_q;
        const bool exists = p < args.tile_p;
        const Strides &y = args.conv.y_strides, &residual = args.conv.residual_strides;
        shared.pixels[i] = {.y = p * y.h + q * y.w,
                            .residual = p * residual.h + q * residual.w,
                            // Slots without a pixel read the first pixel's taps; their results are not stored.
                            .window = exists ? static_cast<int>(p * p_bytes + q * q_bytes) : 0,
                            .p = exists ? static_cast<int16_t>(p) : int16_t{-1},
                            .q = static_cast<int16_t>(q)};
    }
}

template <class Traits>
using Accumulators = float[Traits::fragments_m][Traits::fragments_n][4];

// The i-th of a lane's pixels, eight apart: the upper and lower rows of its fragments.
template <class Traits>
__device__ __forceinline__ const Pixel& pixel_of_lane(const Shared<Traits>& shared, int i) {
    return shared.pixels[thread() / 32 * (Traits::fragments_m * 16) + thread() % 32 / 4 + static_cast<unsigned>(i) * 8];
}

// The main loop: one MMA step of the warp's pixels per turn. `before` is the number of bytes from the window's first pixel
// to the tile's first tap.
template <class Traits>
__device__ __forceinline__ void multiply(const Args& args, const Shared<Traits>& shared,
                                         const Operands<typename Traits::Value>& operands, unsigned before,
                                         Accumulators<Traits>& total) {
    const char* sources[Traits::pixels_per_lane];
#pragma unroll
    for (int i = 0; i < Traits::pixels_per_lane; ++i) {
        sources[i] = reinterpret_cast<const char*>(operands.window) + before + pixel_of_lane(shared, i).window;
    }
    const unsigned weight_row = thread() % 8 + thread() % 32 / 16 * 8;
    uint32_t weights = device::shared_address(operands.weights + weight_row * args.weight_pitch + thread() / 8 % 2 * 4);
    const unsigned weight_step = args.weight_pitch * 16 * 4;
    const Taps* next = operands.taps + thread() % 4;
    Taps taps = *next;  // read one turn ahead; the last turn's read is not used
#pragma unroll 1
    for (unsigned step = args.words / 8; step > 0; --step) {
        uint32_t x[Traits::fragments_m][4];
#pragma unroll
        for (int i = 0; i < Traits::pixels_per_lane; ++i) {
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                const auto word = reinterpret_cast<const uint32_t*>(sources[i] + taps.offset[slot]);
                x[i / 2][slot * 2 + i % 2] = *word & taps.mask[slot];
            }
        }
        next += 4;
        taps = *next;
#pragma unroll
        for (int j = 0; j < Traits::fragments_n; j += 2) {
            uint32_t words[4];
            device::load_matrices(weights + j / 2 * weight_step, words);
            const uint32_t first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int i = 0; i < Traits::fragments_m; ++i) {
                device::multiply_add<typename Traits::Value>(total[i][j], x[i], first);
                device::multiply_add<typename Traits::Value>(total[i][j + 1], x[i], second);
            }
        }
        weights += 32;
    }
}

// A slice is a lane's eight neighbouring channels of one of its pixels; a tile has at most eight slices. Higher indices mean
// the last.
template <class Traits, int Slice>
__device__ __forceinline__ void copy_slice(const Accumulators<Traits>& total, float (&values)[Traits::channels_per_lane]) {
    constexpr int slice = Slice < Traits::slices ? Slice : Traits::slices - 1;
    constexpr int pixel = slice % Traits::pixels_per_lane, group = slice / Traits::pixels_per_lane;
#pragma unroll
    for (int j = 0; j < Traits::channels_per_lane; ++j) {
        values[j] = total[pixel / 2][group * 4 + j / 2][pixel % 2 * 2 + j % 2];
    }
}

// Registers cannot be indexed. The switch compiles to a few jumps and eight moves, a chain of tests to eight selections per
// value. No case leaves the values unchanged: they would then have to live through the loop.
template <class Traits>
__device__ __forceinline__ void take_slice(const Accumulators<Traits>& total, int slice,
                                           float (&values)[Traits::channels_per_lane]) {
    switch (slice) {
        case 0: return copy_slice<Traits, 0>(total, values);
        case 1: return copy_slice<Traits, 1>(total, values);
        case 2: return copy_slice<Traits, 2>(total, values);
        case 3: return copy_slice<Traits, 3>(total, values);
        case 4: return copy_slice<Traits, 4>(total, values);
        case 5: return copy_slice<Traits, 5>(total, values);
        case 6: return copy_slice<Traits, 6>(total, values);
        default: return copy_slice<Traits, 7>(total, values);
    }
}

// Prefetches the residual into the L2 while the main loop runs.
template <class Traits>
__device__ __forceinline__ void prefetch_residual(const Args& args, const TileOrigin& origin, int first_channel,
                                                  const Shared<Traits>& shared) {
    using T = typename Traits::Value;
    const RowPlace first = place_of_pixel(args.conv, {origin.n, origin.p, origin.q});
#pragma unroll 1
    for (int channel = first_channel + static_cast<int>(thread() % 4) * Traits::channels_per_lane;
         channel < first_channel + Traits::n && channel < args.k; channel += Traits::group) {
#pragma unroll 1
        for (int i = 0; i < Traits::pixels_per_lane; ++i) {
            const Pixel& pixel = pixel_of_lane(shared, i);
            if (!pixel.is_inside(args, origin)) continue;
            prefetch_pixel_residual<T>(args.conv, pixel.place(first), channel);
        }
    }
}

// Finishes and stores the tile from registers, in rolled loops, so that the activations are instantiated once.
template <class Traits>
__device__ __forceinline__ void store_pixels(const Args& args, const TileOrigin& origin, int first_channel,
                                             const Shared<Traits>& shared, const Accumulators<Traits>& total) {
    using T = typename Traits::Value;
    constexpr int width = Traits::channels_per_lane;
    const RowPlace first = place_of_pixel(args.conv, {origin.n, origin.p, origin.q});
#pragma unroll 1
    for (int group = 0; group < Traits::groups; ++group) {
        const int column = group * Traits::group + static_cast<int>(thread() % 4) * width;
        const int remaining = args.k - first_channel - column;
        const int channel = first_channel + column;
        ChannelFold folds[width];
        device::Vector16 pieces[sizeof(folds) / 16];
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(folds) / 16); ++i) {
            pieces[i] = reinterpret_cast<const device::Vector16*>(shared.folds + column)[i];
        }
        memcpy(folds, pieces, sizeof(folds));
#pragma unroll 1
        for (int i = 0; i < Traits::pixels_per_lane; ++i) {
            float values[width];
            take_slice<Traits>(total, group * Traits::pixels_per_lane + i, values);
            const Pixel& pixel = pixel_of_lane(shared, i);
            if (pixel.is_inside(args, origin) && remaining > 0) {
                // With eight of erff at a time a tile spills on compute capability 8.0.
                finish_channels<width, T, 2>(values, folds, args.conv, pixel.place(first), channel,
                                             remaining < width ? remaining : width);
            }
        }
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::tile.blocks_per_multiprocessor)
    stem(const __grid_constant__ Args args) {
    using T = typename Traits::Value;
    auto& shared = device::shared_storage<Shared<Traits>>();
    const auto operands = Operands<T>::at(&shared + 1, args, Traits::n);
    const auto block = static_cast<unsigned>(device::block_x());
    const int first_channel = static_cast<int>(block % args.tiles_n * Traits::n);
    static_assert(Traits::n <= Traits::threads, "a thread folds one channel");
    prepare_pixels(args, shared);
    await_kernels_ahead(args.conv, Traits::threads);

    // Packing weights costs as much as a tile of pixels: with a single chunk, a block packs once for all its tiles.
    unsigned packed_chunk = args.chunks;
#pragma unroll 1
    for (unsigned tile = block / args.tiles_n; tile < args.tiles; tile += args.tile_step) {
        const TileOrigin origin = TileOrigin::of(args, tile);
        Accumulators<Traits> total = {};
#pragma unroll 1
        for (unsigned chunk = 0; chunk < args.chunks; ++chunk) {
            const Window window = Window::of<Traits>(args, origin, chunk);
            device::sync_threads();
            load_window<Traits>(args, origin, window, operands.window);
            if (chunk != packed_chunk) {
                const FoldTable<T> folds(args.conv.epilogue, first_channel, Traits::n, args.k - first_channel);
                load_weights<Traits>(args, first_channel, chunk, operands);
                folds.store(shared.folds);
            }
            packed_chunk = chunk;
            device::sync_threads();
            if (chunk == 0 && args.conv.residual) prefetch_residual<Traits>(args, origin, first_channel, shared);
            const unsigned before = (window.before * args.pixel_pitch - args.lead) * sizeof(T);
            multiply<Traits>(args, shared, operands, before, total);
        }
        store_pixels<Traits>(args, origin, first_channel, shared, total);
    }
}

}  // namespace fused_cna::stem
