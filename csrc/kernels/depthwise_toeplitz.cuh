// Depthwise convolution with wide filters on tensor cores. Eight neighbouring outputs of a row are sixteen neighbouring
// inputs times a banded (Toeplitz) matrix of the filter row's taps: for one channel and one filter row, an MMA makes 16
// strips of 8 columns, and the sum over the filter rows stays in its accumulators. float16 and bfloat16, compute capability
// 8.0 and newer; channels of x must be dense.
#pragma once

#include <cstdint>

#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "epilogue.cuh"
#include "rows.cuh"
#include "strip_operands.cuh"

namespace fused_cna::kernels {

inline constexpr int toeplitz_channels_per_warp = StripTile::channels / toeplitz_warps;

// A warp makes every toeplitz_warps-th channel of the slab; of each, all strips by row.
using StripAccumulators = float[toeplitz_channels_per_warp][StripTile::strip_rows][4];

// The right operand of one filter row: T[j][q] = filter[j - q], sixteen inputs j by eight outputs q.
struct ToeplitzFragment {
    uint32_t words[2];
};

// Where a lane finds its words of T in a row of the table. A lane's first word holds inputs 2t and 2t + 1 of output g, its
// second the inputs 8 further; in filters up to 7 wide at most one of both lies in the band.
class ToeplitzReader {
   public:
    __device__ explicit ToeplitzReader(int filter_columns) : is_wide_(filter_columns > 7) {
        const int tap = device::lane() % 4 * 2 - device::lane() / 4;
        has_first_ = tap >= -1;
        has_second_ = is_wide_ ? tap <= 0 : !has_first_;
        second_ = has_second_ ? tap + 9 : 0;
        first_ = has_first_ ? tap + 1 : is_wide_ ? 0 : second_;
    }

    __device__ __forceinline__ ToeplitzFragment read(const uint32_t* filter_row) const {
        const uint32_t first = filter_row[first_];
        uint32_t second = first;
        if (is_wide_) second = filter_row[second_];
        return {has_first_ ? first : 0, has_second_ ? second : 0};
    }

   private:
    bool is_wide_, has_first_, has_second_;
    int first_, second_;
};

// Where a strip begins in a channel's plane, in bytes; one that the tile does not have is read as the first.
__device__ __forceinline__ int strip_offset(const ToeplitzArgs& args, int strip) {
    const Strip position = Strip::of(args.tile, strip < args.tile.strips() ? strip : 0);
    const StripPlanes& planes = args.planes;
    return (position.image * planes.image + position.down * (StripTile::strip_rows * planes.row + planes.skew) +
            position.across) *
           chunk_bytes;
}

__device__ __forceinline__ int row_offset(const StripPlanes& planes, int row) {
    return (row * planes.row + row / StripTile::strip_rows * planes.skew) * chunk_bytes;
}

// One channel of an MMA tile. A row of the planes is read once and multiplied with every filter row that it meets in the
// strip's rows.
template <class T, int FilterRows>
__device__ __forceinline__ void multiply_channel(const ToeplitzArgs& args, uint32_t strip_address, const uint32_t* filter,
                                                 const ToeplitzReader& reader, float (&total)[StripTile::strip_rows][4]) {
#pragma unroll 1
    for (int first_row = 0; first_row < args.filter_rows; first_row += FilterRows) {
        ToeplitzFragment fragments[FilterRows];
#pragma unroll
        for (int r = 0; r < FilterRows; ++r) {
            fragments[r] = reader.read(filter + (first_row + r) * StripMemory::filter_row_words);
        }
#pragma unroll
        for (int row = 0; row < FilterRows + StripTile::strip_rows - 1; ++row) {
            uint32_t x[4];
            device::load_matrices(strip_address + row_offset(args.planes, first_row + row), x);
#pragma unroll
            for (int j = 0; j < StripTile::strip_rows; ++j) {
                if (row >= j && row - j < FilterRows) device::multiply_add<T>(total[j], x, fragments[row - j].words);
            }
        }
    }
}

// The same by the formula, where x has an infinity or a NaN: the zeros of T would carry it to outputs that do not read it.
template <class T>
__device__ __forceinline__ void sum_channel(const ToeplitzArgs& args, const unsigned char* plane, const uint32_t* filter,
                                            float (&total)[StripTile::strip_rows][4]) {
    const T* strips[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = strip_offset(args, device::lane() / 4 + half * 8);
        strips[half] = reinterpret_cast<const T*>(plane + offset) + device::lane() % 4 * 2;
    }
#pragma unroll
    for (int j = 0; j < StripTile::strip_rows; ++j) {
#pragma unroll 1
        for (int r = 0; r < args.r; ++r) {
            const int row = row_offset(args.planes, r + j) / static_cast<int>(sizeof(T));
            float row_sums[4] = {};
#pragma unroll 1
            for (int s = 0; s < args.s; ++s) {
                const float tap = first_value<T>(filter[r * StripMemory::filter_row_words + s + 1]);
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

template <class T, int FilterRows>
__device__ __forceinline__ void accumulate_strips(const ToeplitzArgs& args, const StripBlock& block,
                                                  const StripShared& shared, bool finite, StripAccumulators& total) {
    const int strip = device::lane() % StripTile::most_strips;
    // The second half of the lanes brings the inputs 8 columns further.
    const int offset = strip_offset(args, strip) + device::lane() / 16 * chunk_bytes;
    const ToeplitzReader reader(args.s);
#pragma unroll
    for (int i = 0; i < toeplitz_channels_per_warp; ++i) {
        const int channel = device::warp() + i * toeplitz_warps;
        if (channel >= block.channels) continue;
        const unsigned char* plane = shared.planes + plane_offset(args.planes, channel);
        const uint32_t* filter = shared.filter + channel * args.filter_rows * StripMemory::filter_row_words;
        if (finite) {
            multiply_channel<T, FilterRows>(args, device::shared_address(plane) + offset, filter, reader, total[i]);
        } else {
            sum_channel<T>(args, plane, filter, total[i]);
        }
    }
}

// The pixel that is row `index` of the staged accumulators. Rows are ordered as accumulators lie in registers and lanes,
// which keeps their writes free of bank conflicts.
__device__ __forceinline__ Pixel pixel_of_accumulator(const ToeplitzArgs& args, const StripBlock& block, int index) {
    const int lane = index % 32, i = index / 32 % 4, row = index / 128;
    return block.pixel_of_strip(args, lane / 4 + i / 2 * 8, row, lane % 4 * 2 + i % 2);
}

template <class T>
__device__ __forceinline__ void store_strips(const ToeplitzArgs& args, const StripBlock& block, const StripShared& shared,
                                             const StripAccumulators& total) {
#pragma unroll
    for (int c = 0; c < toeplitz_channels_per_warp; ++c) {
        float* column = shared.accumulators + device::warp() + c * toeplitz_warps;
#pragma unroll
        for (int j = 0; j < StripTile::strip_rows; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                column[((j * 4 + i) * 32 + device::lane()) * StripMemory::pitch] = total[c][j][i];
            }
        }
    }
#pragma unroll 1
    for (int i = device::thread_x(); i < StripTile::pixels; i += toeplitz_threads) {
        shared.places[i] = place_of_pixel(args.conv, pixel_of_accumulator(args, block, i));
    }
    device::sync_threads();
    store_tile<T, StripTile::pixels, StripTile::channels, StripMemory::pitch, toeplitz_threads>(
        args.conv, shared.accumulators, shared.places, shared.tables.folds, {block.first_channel, block.channels});
}

template <class T, int FilterRows>
__global__ void __launch_bounds__(toeplitz_threads, toeplitz_blocks_per_multiprocessor)
    depthwise_toeplitz(const __grid_constant__ ToeplitzArgs args) {
    const StripShared shared = StripShared::of(args, &device::shared_storage<unsigned char>());
    const StripBlock block = StripBlock::of(args);
    const bool thread_finite = stage_planes<T>(args, block, shared);
    const uint32_t votes = device::ballot(!thread_finite);
    if (device::lane() == 0) shared.tables.not_finite[device::warp()] = votes;
    stage_filter<T>(args, block, shared);
    const int thread = device::thread_x();
    if (thread < block.channels) {
        shared.tables.folds[thread] = fold_channel<T>(args.conv.epilogue, block.first_channel + thread);
    }
    device::sync_threads();

    bool finite = true;
#pragma unroll
    for (const uint32_t lanes : shared.tables.not_finite) finite = finite && lanes == 0;
    StripAccumulators total = {};
    accumulate_strips<T, FilterRows>(args, block, shared, finite, total);
    device::sync_threads();
    store_strips<T>(args, block, shared, total);
}

}  // namespace fused_cna::kernels
