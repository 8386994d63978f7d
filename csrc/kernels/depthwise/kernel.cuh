// Depthwise convolution on the CUDA cores, for x with dense channels. A thread owns 16 bytes of channels and a strip of 7
// output columns, and goes down the filter rows; each load serves every column that needs it.
#pragma once

#include <device/device.cuh>

#include "kernels/common/epilogue.cuh"
#include "kernels/common/start.cuh"
#include "kernels/depthwise/tile.h"

namespace fused_cna::depthwise {

struct Args {
    ConvArgs conv;
    int p, q;        // of the output
    int multiplier;  // output channels per input channel
    Divisor chunks;  // per slab
    int strips;      // per block at a time
    Divisor slabs;
    Divisor strips_per_row, band_rows, bands;  // per image
    int all_strips;                            // including the rows that the last band lacks
    int strip_step;                            // from a block's strips to its next ones
};

// VectorBytes: the widest load of x that channels and alignment allow, 16 or 4; 0 for value by value.
template <class T, Tile Of, int VectorBytes>
struct Traits {
    using Value = T;
    static constexpr Tile tile = Of;
    static constexpr int vector_bytes = VectorBytes;
    static constexpr int columns = strip_columns;
    static constexpr int values = device::values_per_vector<T>;  // channels per chunk
    static constexpr int quads = values / 4;
    static constexpr int taps = tile.takes_any() ? most_taps : tile.filter * tile.filter;
    // Four floats longer than a slab: the weights of one channel, contiguous in global memory, are then written to different
    // banks.
    static constexpr int weight_pitch = most_chunks * values + 4;

    static_assert(taps <= 64, "more than 64 products in one running sum lose accuracy");
    static_assert(tile.by_value == (vector_bytes == 0), "a tile says whether it loads value by value");
};

template <class Traits>
struct Shared {
    // Each thread's own: 16 bytes beside its neighbours', so that accesses have no bank conflicts.
    alignas(16) float sums[Traits::columns][Traits::quads][threads][4];
    // As float, else every strip would convert them again. For each tap the first four values of all chunks, then the next
    // four: threads of neighbouring chunks read neighbouring 16 bytes.
    alignas(16) float weights[Traits::taps][Traits::weight_pitch];
    ChannelFold folds[most_chunks * Traits::values];
    static_assert(Traits::tile.shared_bytes(sizeof(typename Traits::Value)) ==
                      (Traits::columns * Traits::quads * threads + Traits::taps * Traits::weight_pitch / 4) * 16 +
                          sizeof(folds),
                  "the plan counts the shared memory of every member");
    static_assert(Traits::tile.shared_bytes(sizeof(typename Traits::Value)) <= 48 * 1024,
                  "a block must fit the 48 KB that need no opt-in");
};

template <class Traits>
using Sums = float[Traits::columns][Traits::values];

// Slabs vary fastest over the grid: blocks that run together read whole pixels.
struct Thread {
    int slab_channel;   // the block's first output channel
    int chunk, strip;   // within the block
    int first_channel;  // of the chunk
    int channels;       // channels of the chunk that exist; 0 or fewer where the thread has no work

    // The channels of a chunk that exists; with 16-byte accesses always all.
    template <class Traits>
    __device__ int valid() const {
        return Traits::vector_bytes == 16 ? Traits::values : channels;
    }

    template <class Traits>
    static __device__ Thread of(const Args& args) {
        const int slab = args.slabs.remainder(static_cast<int>(device::block_x()));
        const int slab_channel = slab * args.chunks.value * Traits::values;
        const int chunk = args.chunks.remainder(device::thread_x()), strip = args.chunks.quotient(device::thread_x());
        const int k = static_cast<int>(args.conv.problem.k);
        // A thread beyond the block's strips starts after the last channel, so it has no work.
        const int first_channel = strip < args.strips ? slab_channel + chunk * Traits::values : k;
        const int remaining = k - first_channel;
        return {.slab_channel = slab_channel,
                .chunk = chunk,
                .strip = strip,
                .first_channel = first_channel,
                .channels = remaining < Traits::values ? remaining : Traits::values};
    }
};

// A strip, given by its first pixel. Strips above each other are consecutive: they share rows of x, which the second finds
// in the L1. They are numbered through the whole batch, so that no thread idles on small images.
struct Strip {
    int n, p, q;  // n is -1 where there is no strip

    __device__ bool exists() const { return n >= 0; }

    template <class Traits>
    static __device__ Strip of(const Args& args, const Thread& thread, int index) {
        const int column = args.band_rows.quotient(index), band = args.strips_per_row.quotient(column);
        const int p = args.bands.remainder(band) * args.band_rows.value + args.band_rows.remainder(index);
        // Not thread.channels, which would need a register; the main loop has none left.
        const bool exists =
            index < args.all_strips && p < args.p && thread.first_channel < static_cast<int>(args.conv.problem.k);
        return {exists ? args.bands.quotient(band) : -1, p, args.strips_per_row.remainder(column) * Traits::columns};
    }
};

// Copies the weights of `taps` taps of the slab, from `first_tap` on, into shared memory, in batches whose loads all start
// before the first is waited for.
template <class Traits>
__device__ __forceinline__ void load_weights(const Args& args, const Thread& thread, int first_tap, int taps,
                                             Shared<Traits>& shared) {
    using T = typename Traits::Value;
    // A thread's share of a slab if the filter is known at compile time; other filters take more instructions per weight.
    constexpr int wanted = (most_chunks * Traits::values * Traits::taps + threads - 1) / threads;
    constexpr int batch = Traits::tile.takes_any() ? 4 : wanted < 16 ? wanted : 16;
    const FilterStrides& strides = args.conv.weight_strides;
    const int filter_s = Traits::tile.takes_any() ? static_cast<int>(args.conv.problem.s) : Traits::tile.filter;
    const int count = args.chunks.value * Traits::values * taps;
#pragma unroll 1
    for (int first = device::thread_x(); first < count; first += batch * threads) {
        T weights[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            const int index = first + i * threads, tap = first_tap + index % taps;
            const int channel = thread.slab_channel + index / taps;
            weights[i] = device::from_float<T>(0.0f);
            if (index >= count || channel >= args.conv.problem.k) continue;
            weights[i] = static_cast<const T*>(
                args.conv.weight)[channel * strides.k + tap / filter_s * strides.r + tap % filter_s * strides.s];
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            const int index = first + i * threads, channel = index / taps;
            const int place = (channel % Traits::values / 4 * most_chunks + channel / Traits::values) * 4 + channel % 4;
            if (index < count) shared.weights[index % taps][place] = device::to_float(weights[i]);
        }
    }
}

// A chunk's values from shared memory, `pitch` floats from one group of four to the next.
template <int Values>
__device__ __forceinline__ void read_chunk(const float* source, int pitch, float (&values)[Values]) {
#pragma unroll
    for (int quad = 0; quad < Values / 4; ++quad) {
        float four[4];
        device::load_vector(source + quad * pitch, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[quad * 4 + i] = four[i];
    }
}

// A bit for each column from `first` on: whether it is inside an image of `width`.
__device__ __forceinline__ uint32_t columns_inside(int first, int columns, int width) {
    const int begin = first < 0 ? -first : 0;
    const int end = width - first < columns ? width - first : columns;
    return begin < end ? (1u << end) - (1u << begin) : 0u;
}

// A filter known at compile time: for each of its rows, every column of x that the strip needs is loaded once.
template <class Traits>
__device__ __forceinline__ void slide(const Args& args, const Thread& thread, const Strip& strip,
                                      const Shared<Traits>& shared, Sums<Traits>& sums) {
    using T = typename Traits::Value;
    constexpr int filter = Traits::tile.filter, stride = Traits::tile.stride;
    constexpr int span = (Traits::columns - 1) * stride + filter;  // columns of x
    static_assert(span < 32, "the columns of x are counted in the bits of a word");
    const ConvProblem& problem = args.conv.problem;
    const Strides& strides = args.conv.x_strides;
    const int first_h = strip.p * stride - static_cast<int>(problem.pad_top);
    const int first_w = strip.q * stride - static_cast<int>(problem.pad_left);
    const uint32_t inside = strip.exists() ? columns_inside(first_w, span, static_cast<int>(problem.w)) : 0u;
    const T* row = static_cast<const T*>(args.conv.x) + strip.n * strides.n + first_h * strides.h + first_w * strides.w +
                   thread.first_channel;
#pragma unroll 1
    for (int r = 0; r < filter; ++r, row += strides.h) {
        const bool row_inside = static_cast<uint32_t>(first_h + r) < static_cast<uint32_t>(problem.h);
        const uint32_t row_mask = row_inside ? inside : 0u;
        device::Vector16 chunks[span];
        const T* source = row;
#pragma unroll
        for (int i = 0; i < span; ++i, source += strides.w) {
            chunks[i] = row_mask >> i & 1 ? device::load_pieces<Traits::vector_bytes>(source, thread.valid<Traits>())
                                          : device::Vector16{};
        }
        // Four channels at a time, so that the weights leave registers for the loads in flight.
#pragma unroll
        for (int quad = 0; quad < Traits::quads; ++quad) {
            float weights[filter][4];
#pragma unroll
            for (int s = 0; s < filter; ++s) {
                device::load_vector(&shared.weights[r * filter + s][(quad * most_chunks + thread.chunk) * 4], weights[s]);
            }
#pragma unroll
            for (int i = 0; i < span; ++i) {
                float x[Traits::values];
                device::convert_vector<T>(chunks[i], x);
#pragma unroll
                for (int column = 0; column < Traits::columns; ++column) {
                    const int s = i - column * stride;
                    if (s < 0 || s >= filter) continue;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float& sum = sums[column][quad * 4 + j];
                        sum = fmaf(x[quad * 4 + j], weights[s][j], sum);
                    }
                }
            }
        }
    }
}

// The input channel of each output channel of a chunk. Channels beyond the last use the last one's; their sums are not
// stored.
template <int Values>
struct InputChannels {
    int channels[Values];

    __device__ InputChannels(const Args& args, int first_channel) {
        const int last = static_cast<int>(args.conv.problem.k) - 1;
#pragma unroll
        for (int i = 0; i < Values; ++i) {
            channels[i] = (first_channel + i < last ? first_channel + i : last) / args.multiplier;
        }
    }
};

// A chunk of the pixel of x at `source` (its first channel); zeros where the pixel is not `inside`.
template <class Traits, class T>
__device__ __forceinline__ void load_chunk(const T* source, bool inside, const Thread& thread,
                                           const InputChannels<Traits::values>& input, float (&x)[Traits::values]) {
    if constexpr (Traits::vector_bytes > 0) {
        const int valid = inside ? thread.valid<Traits>() : 0;
        device::convert_vector<T>(device::load_pieces<Traits::vector_bytes>(source + thread.first_channel, valid), x);
    } else {
#pragma unroll
        for (int i = 0; i < Traits::values; ++i) x[i] = inside ? device::to_float(source[input.channels[i]]) : 0.0f;
    }
}

// Any filter: `taps` taps from `first_tap` on, whose weights are in shared memory.
template <class Traits>
__device__ __forceinline__ void multiply_taps(const Args& args, const Thread& thread, const Strip& strip, int first_tap,
                                              int taps, const Shared<Traits>& shared, Sums<Traits>& sums) {
    using T = typename Traits::Value;
    const ConvProblem& problem = args.conv.problem;
    const Strides& strides = args.conv.x_strides;
    const int filter_s = static_cast<int>(problem.s), stride_w = static_cast<int>(problem.stride_w);
    const int first_h = strip.p * static_cast<int>(problem.stride_h) - static_cast<int>(problem.pad_top);
    const int first_w = strip.q * stride_w - static_cast<int>(problem.pad_left);
    const T* image = static_cast<const T*>(args.conv.x) + strip.n * strides.n;
    const InputChannels<Traits::values> input(args, thread.first_channel);
    int r = first_tap / filter_s, s = first_tap % filter_s;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
        const int h = first_h + r * static_cast<int>(problem.dil_h), w = first_w + s * static_cast<int>(problem.dil_w);
        const bool row_inside = strip.exists() && static_cast<uint32_t>(h) < static_cast<uint32_t>(problem.h);
        const uint32_t width = row_inside ? static_cast<uint32_t>(problem.w) : 0u;
        float weights[Traits::values];
        read_chunk(&shared.weights[tap][thread.chunk * 4], most_chunks * 4, weights);
        const T* source = image + h * strides.h + w * strides.w;
#pragma unroll
        for (int column = 0; column < Traits::columns; ++column, source += stride_w * strides.w) {
            float x[Traits::values];
            load_chunk<Traits>(source, static_cast<uint32_t>(w + column * stride_w) < width, thread, input, x);
#pragma unroll
            for (int i = 0; i < Traits::values; ++i) sums[column][i] = fmaf(x[i], weights[i], sums[column][i]);
        }
        s = s + 1 == filter_s ? 0 : s + 1;
        r += s == 0;
    }
}

// Adds a thread's sums to those in shared memory, for store_strip; the `first` overwrite them.
template <class Traits>
__device__ __forceinline__ void stage_sums(const Sums<Traits>& sums, bool first, Shared<Traits>& shared) {
#pragma unroll
    for (int column = 0; column < Traits::columns; ++column) {
#pragma unroll
        for (int quad = 0; quad < Traits::quads; ++quad) {
            float* place = shared.sums[column][quad][device::thread_x()];
            float total[4] = {};
            if (!first) device::load_vector(place, total);
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += sums[column][quad * 4 + i];
            device::store_vector(place, total);
        }
    }
}

// Computes the sums of every thread's strip into shared memory.
template <class Traits>
__device__ __forceinline__ void accumulate(const Args& args, const Thread& thread, const Strip& strip,
                                           Shared<Traits>& shared) {
    if constexpr (!Traits::tile.takes_any()) {
        Sums<Traits> sums = {};
        slide(args, thread, strip, shared, sums);
        stage_sums<Traits>(sums, true, shared);
    } else {
        const int all_taps = static_cast<int>(args.conv.problem.gemm_k());
        for (int first_tap = 0; first_tap < all_taps; first_tap += Traits::taps) {
            const int remaining = all_taps - first_tap, taps = remaining < Traits::taps ? remaining : Traits::taps;
            if (all_taps > Traits::taps) {
                device::sync_threads();
                load_weights(args, thread, first_tap, taps, shared);
                device::sync_threads();
            }
            Sums<Traits> sums = {};
            multiply_taps(args, thread, strip, first_tap, taps, shared, sums);
            stage_sums<Traits>(sums, first_tap == 0, shared);
        }
    }
}

// Prefetches a strip's residual into the L2 while the main loop runs.
template <class Traits>
__device__ __forceinline__ void prefetch_residual(const Args& args, const Thread& thread, const Strip& strip) {
    RowPlace place = place_of_pixel(args.conv, {strip.n, strip.p, strip.q});
#pragma unroll 1
    for (int q = strip.q; q < strip.q + Traits::columns && q < args.q; ++q) {
        prefetch_pixel_residual<typename Traits::Value>(args.conv, place, thread.first_channel);
        place.residual += args.conv.residual_strides.w;
    }
}

// Finishes and stores a thread's strip pixel by pixel, in a rolled loop, so that the activations are instantiated once.
template <class Traits>
__device__ __forceinline__ void store_strip(const Args& args, const Thread& thread, const Strip& strip,
                                            const Shared<Traits>& shared) {
    using T = typename Traits::Value;
    const ConvArgs& conv = args.conv;
    ChannelFold folds[Traits::values];
#pragma unroll
    for (int i = 0; i < Traits::values; ++i) folds[i] = shared.folds[thread.chunk * Traits::values + i];
    RowPlace place = place_of_pixel(conv, {strip.n, strip.p, strip.q});
    const int remaining = args.q - strip.q, valid = thread.valid<Traits>();
    const int columns = remaining < Traits::columns ? remaining : Traits::columns;
#pragma unroll 1
    for (int column = 0; column < columns; ++column) {
        float sums[Traits::values];
        read_chunk(shared.sums[column][0][device::thread_x()], threads * 4, sums);
        finish_channels<Traits::values, T>(sums, folds, conv, place, thread.first_channel, valid);
        place.y += conv.y_strides.w;
        place.residual += conv.residual_strides.w;
    }
}

template <class Traits>
__global__ void __launch_bounds__(threads, Traits::tile.blocks_per_multiprocessor)
    depthwise(const __grid_constant__ Args args) {
    static_assert(most_chunks * Traits::values <= threads, "a thread folds one channel");
    auto& shared = device::shared_storage<Shared<Traits>>();
    const Thread thread = Thread::of<Traits>(args);
    const int all_taps = Traits::tile.takes_any() ? static_cast<int>(args.conv.problem.gemm_k()) : Traits::taps;
    await_kernels_ahead(args.conv, threads);
    const FoldTable<typename Traits::Value> folds(args.conv.epilogue, thread.slab_channel,
                                                  args.chunks.value * Traits::values,
                                                  args.conv.problem.k - thread.slab_channel);
    if (all_taps <= Traits::taps) load_weights(args, thread, 0, all_taps, shared);
    folds.store(shared.folds);
    device::sync_threads();

    const int begin = args.slabs.quotient(static_cast<int>(device::block_x())) * args.strips;
#pragma unroll 1
    for (int index = begin + thread.strip; index - thread.strip < args.all_strips; index += args.strip_step) {
        const Strip strip = Strip::of<Traits>(args, thread, index);
        if (args.conv.residual && strip.exists()) prefetch_residual<Traits>(args, thread, strip);
        accumulate(args, thread, strip, shared);
        if (strip.exists()) store_strip(args, thread, strip, shared);
    }
}

}  // namespace fused_cna::depthwise
