// Depthwise convolution with wide filters on tensor cores. Eight neighbouring outputs of a row are sixteen neighbouring
// inputs times a banded (Toeplitz) matrix of the filter row's taps. For one channel and one filter row, an MMA computes 16
// strips of 8 columns; the sum over the filter rows stays in its accumulators. float16 and bfloat16, compute capability 8.0
// and newer; channels of x must be dense.
#pragma once

#include <device/device.cuh>

#include "kernels/common/start.cuh"
#include "kernels/depthwise_toeplitz/operands.cuh"

namespace fused_cna::depthwise_toeplitz {

inline constexpr int channels_per_warp = slab_channels / warps;

// A warp computes every warps-th channel of the slab: for each channel, all strips by row.
using Accumulators = float[channels_per_warp][strip_rows][4];

// A lane's words of the right operand for one filter row; see Words.
struct alignas(8) Fragment {
    uint32_t words[2];
};

// Whether strips that one load_matrices reads together are in distinct banks, for every tile.
constexpr bool strips_lie_in_distinct_banks(int filter_rows) {
    for (int across = 1; across <= most_strips; ++across) {
        for (int down = 1; down * across <= most_strips; ++down) {
            const Choice tile{.images = most_strips / (down * across), .down = down, .across = across};
            const Layout layout = Layout::of(tile, filter_rows);
            for (int first = 0; first < tile.strips(); first += 8) {
                unsigned banks = 0;
                for (int strip = first; strip < first + 8 && strip < tile.strips(); ++strip) {
                    const unsigned bank = 1u << layout.strip_chunk(tile, strip) % 8;
                    if (banks & bank) return false;
                    banks |= bank;
                }
            }
        }
    }
    return true;
}
static_assert(strips_lie_in_distinct_banks(5) && strips_lie_in_distinct_banks(7) && strips_lie_in_distinct_banks(10));

// One channel of an MMA tile. A row of the planes is read once and multiplied by every filter row that the strip's rows need
// it for.
template <class T, int FilterRows>
__device__ __forceinline__ void multiply_channel(const Args& args, uint32_t strip_address, const uint32_t* filter,
                                                 float (&total)[strip_rows][4]) {
    const int distance = device::lane() % 4 * 2 - device::lane() / 4 + farthest_back;
#pragma unroll 1
    for (int first_row = 0; first_row < args.filter_rows; first_row += FilterRows) {
        Fragment fragments[FilterRows];
#pragma unroll
        for (int r = 0; r < FilterRows; ++r) {
            const uint32_t* filter_row = filter + (first_row + r) * filter_row_pitch;
            fragments[r] = reinterpret_cast<const Fragment*>(filter_row)[distance];
        }
        uint32_t address = strip_address + row_offset(args.layout, first_row);
#pragma unroll
        for (int row = 0; row < FilterRows + strip_rows - 1; ++row) {
            uint32_t x[4];
            device::load_matrices(address, x);
            address += args.layout.row * chunk_bytes;
            if ((first_row + row + 1) % strip_rows == 0) address += args.layout.skew * chunk_bytes;
#pragma unroll
            for (int j = 0; j < strip_rows; ++j) {
                if (row >= j && row - j < FilterRows) device::multiply_add<T>(total[j], x, fragments[row - j].words);
            }
        }
    }
}

// The same by the plain formula.
template <class T>
__device__ __forceinline__ void sum_channel(const Args& args, const Tables& tables, const unsigned char* plane,
                                            const uint32_t* filter, float (&total)[strip_rows][4]) {
    const T* strips[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = tables.strips[device::lane() / 4 + half * 8].offset;
        strips[half] = reinterpret_cast<const T*>(plane + offset) + device::lane() % 4 * 2;
    }
#pragma unroll
    for (int j = 0; j < strip_rows; ++j) {
#pragma unroll
        for (float& value : total[j]) value = 0.0f;
#pragma unroll 1
        for (int r = 0; r < args.r; ++r) {
            const int row = row_offset(args.layout, r + j) / static_cast<int>(sizeof(T));
            float row_sums[4] = {};
#pragma unroll 1
            for (int s = 0; s < args.s; ++s) {
                const float tap = tap_of_words<T>(filter + r * filter_row_pitch, s);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    row_sums[i] = fmaf(device::to_float(strips[i / 2][row + s + i % 2]), tap, row_sums[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) total[j][i] += row_sums[i];
        }
    }
}

// Whether all of a warp's accumulators are finite.
__device__ __forceinline__ bool are_finite(const float (&total)[strip_rows][4]) {
    float zero = 0.0f;
#pragma unroll
    for (const auto& row : total) {
#pragma unroll
        for (const float value : row) zero = fmaf(value, 0.0f, zero);
    }
    return device::ballot(zero != 0.0f) == 0;
}

template <class T, int FilterRows>
__device__ __forceinline__ void accumulate_strips(const Args& args, const Block& block, const Shared& shared,
                                                  Accumulators& total) {
    // The second half of the lanes reads the inputs 8 columns further.
    const int offset = shared.tables.strips[device::lane() % most_strips].offset + device::lane() / 16 * chunk_bytes;
#pragma unroll
    for (int i = 0; i < channels_per_warp; ++i) {
        const int channel = device::warp() + i * warps;
        if (channel >= block.channels) continue;
        const unsigned char* plane = shared.planes + plane_offset(args.layout, channel);
        const uint32_t* filter = shared.filter + channel * args.filter_rows * filter_row_pitch;
        multiply_channel<T, FilterRows>(args, device::shared_address(plane) + offset, filter, total[i]);
        // Zeros of the matrix turn an infinity or NaN of x into NaN in outputs that do not read it: recompute these.
        if (!are_finite(total[i])) sum_channel<T>(args, shared.tables, plane, filter, total[i]);
    }
}

// Rows of the staged accumulators are in the order of registers and lanes, one strip row after the other, so that the writes
// have no bank conflicts.
__device__ __forceinline__ void stage_accumulators(const Accumulators& total, float* accumulators) {
#pragma unroll
    for (int c = 0; c < channels_per_warp; ++c) {
        float* column = accumulators + device::lane() * pitch + device::warp() + c * warps;
#pragma unroll
        for (int j = 0; j < strip_rows; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                column[j * row_pitch + i * 32 * pitch] = total[c][j][i];
            }
        }
    }
}

// What a thread stores: the same 8 channels of one column of a strip, in all its rows, so that addresses and folds are made
// once.
struct Share {
    static constexpr int width = 8, halves = slab_channels / width, pixels = threads / halves;
    static_assert(pixels == most_pixels / strip_rows, "one thread for every pixel of a row of all strips");

    int index, column;  // row of the staged accumulators; first of the slab's channels
    Pixel first;        // does not exist where there is nothing to store
    int rows, channels;

    static __device__ Share of(const Args& args, const Block& block, const Shared& shared) {
        // Neighbouring threads write along the dense dimension of y: channels, else pixels.
        const bool channels_dense = args.conv.y_strides.c == 1;
        const int thread = device::thread_x();
        const int column = (channels_dense ? thread % halves : thread / pixels) * width;
        const int index = channels_dense ? thread / halves : thread % pixels;
        const int lane = index % 32, i = index / 32;
        const Strip& strip = shared.tables.strips[lane / 4 + i / 2 * 8];
        const int q = strip.q + lane % 4 * 2 + i % 2;
        const int rows = args.output.p - strip.p, channels = block.channels - column;
        return {.index = index,
                .column = column,
                .first = {q < args.output.q && channels > 0 ? strip.n : -1, strip.p, q},
                .rows = rows < strip_rows ? rows : strip_rows,
                .channels = channels < width ? channels : width};
    }
};

// Prefetches the residual into the L2 while the main loop runs.
template <class T>
__device__ __forceinline__ void prefetch_residual(const Args& args, const Block& block, const Shared& shared) {
    const Share share = Share::of(args, block, shared);
    if (!share.first.exists()) return;
    RowPlace place = place_of_pixel(args.conv, share.first);
#pragma unroll 1
    for (int row = 0; row < share.rows; ++row) {
        prefetch_pixel_residual<T>(args.conv, place, block.first_channel + share.column);
        place.residual += args.conv.residual_strides.h;
    }
}

// Finishes and stores the staged accumulators.
template <class T>
__device__ __forceinline__ void store_strips(const Args& args, const Block& block, const Shared& shared) {
    constexpr int width = Share::width;
    const ConvArgs& conv = args.conv;
    const Share share = Share::of(args, block, shared);
    if (!share.first.exists()) return;
    RowPlace place = place_of_pixel(conv, share.first);
    const float* staged = shared.accumulators + share.index * pitch + share.column;
    ChannelFold folds[width];
#pragma unroll
    for (int j = 0; j < width; ++j) folds[j] = shared.tables.folds[share.column + j];
#pragma unroll 1
    for (int row = 0; row < share.rows; ++row) {
        float values[width];
#pragma unroll
        for (int j = 0; j < width; ++j) values[j] = staged[row * row_pitch + j];
        finish_channels<width, T>(values, folds, conv, place, block.first_channel + share.column, share.channels);
        place.y += conv.y_strides.h;
        place.residual += conv.residual_strides.h;
    }
}

template <class T, int FilterRows>
__global__ void __launch_bounds__(threads, blocks_per_multiprocessor) depthwise_toeplitz(const __grid_constant__ Args args) {
    const Shared shared = Shared::of(args, &device::shared_storage<unsigned char>());
    const Block block = Block::of(args);
    const int thread = device::thread_x();
    const auto prepare_strips = [&] {
        if (thread < most_strips) shared.tables.strips[thread] = block.strip(args, thread);
    };
    if constexpr (prepares_ahead) prepare_strips();
    await_kernels_ahead(args.conv, threads);
    const FoldTable<T> folds(args.conv.epilogue, block.first_channel, slab_channels, block.channels);
    const FilterRow<T> filter_row(args, block, thread);
    stage_planes<T>(args, block, shared);
    filter_row.store(shared, thread);
    stage_other_rows<T>(args, block, shared);
    if constexpr (!prepares_ahead) prepare_strips();
    folds.store(shared.tables.folds);
    device::sync_threads();

    if (args.conv.residual) prefetch_residual<T>(args, block, shared);
    Accumulators total = {};
    accumulate_strips<T, FilterRows>(args, block, shared, total);
    device::sync_threads();
    stage_accumulators(total, shared.accumulators);
    device::sync_threads();
    store_strips<T>(args, block, shared);
}

}  // namespace fused_cna::depthwise_toeplitz
