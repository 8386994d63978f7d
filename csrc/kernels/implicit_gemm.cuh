// Dense and grouped convolution as an implicit GEMM: operands are brought by cp.async through several stages of swizzled
// shared memory, and multiplied by one of the arithmetics in gemm_tensor_cores.cuh and gemm_cuda_cores.cuh. Compute
// capability 8.0 and newer. Channels of x and of the weight must be dense (stride 1).
#pragma once

#include <cstdint>

#include <device/launch.cuh>
#include <device/ptx.cuh>
#include <device/types.cuh>
#include <device/vector.cuh>

#include "../conv_args.h"
#include "activation_rows.cuh"
#include "fold.cuh"
#include "tile_store.cuh"

namespace fused_cna::kernels::implicit_gemm {

// Everything that is the same for all threads and dear to compute, made on the host once per launch.
struct ImplicitGemmArgs {
    ConvArgs conv;
    ActivationGeometry x;
    WalkSteps walk_steps[3];  // to the next channels, the next s, the next r
    int64_t weight_k_bytes;   // stride of the weight's output channels
    int c_per_group, k_per_group;
    Divisor tiles_per_group, tiles_n, tiles_m;
    Divisor channel_steps;  // main-loop steps per tap
    int last_s;             // of a filter row
    int steps;              // main-loop steps of the whole reduction
    int steps_per_split;
};

// AccessBytes: the widest access that channels and alignment allow, 16, 8 or 4.
// Arithmetic says how a warp multiplies what lies in a stage, and names:
//   bytes_per_step               of every row, that one step of it takes
//   rows_per_slice               rows of a warp that the epilogue takes at a time
//   reads_ahead                  whether it has two buffers, or only buffer 0
//   Math<Traits>                 the accumulators of one thread, with
//     Math(stages)               reads from the memory of the stages
//     read(buffer, stage, k)     takes step k of a stage into a buffer
//     multiply(buffer)           adds the products of a buffer
//     end_chunk()                without a second buffer: is called once 64 products or fewer were added, and at the end
//     write(slice, rows, pitch)  writes the warp's slice-th rows to memory whose rows lie `pitch` floats apart
//     repair(...)                goes over sums that the whole block wrote, and mends what the arithmetic could not make
template <class T, GemmTile Tile, int AccessBytes, class Arithmetic>
struct ImplicitGemmTraits {
    using Value = T;
    using Math = typename Arithmetic::template Math<ImplicitGemmTraits>;
    static constexpr GemmTile tile = Tile;
    static constexpr int m = tile.m, n = tile.n, row_bytes = tile.k_bytes, k = row_bytes / sizeof(T);
    static constexpr int steps_per_chunk = 64 / k;
    static constexpr int stages = tile.stages, warps_m = tile.warps_m, warps_n = tile.warps_n;
    static constexpr int threads = tile.threads();
    static constexpr int access_bytes = AccessBytes;

    // A thread copies one 16-byte chunk of every row_pass-th row.
    static constexpr int chunks_per_row = row_bytes / 16, row_pass = threads / chunks_per_row;
    static constexpr int x_rows = m / row_pass, weight_rows = n / row_pass;
    static constexpr int values_per_chunk = 16 / sizeof(T), values_per_access = AccessBytes / sizeof(T);
    static constexpr int stage_bytes = (m + n) * row_bytes, weight_start = m * row_bytes;

    static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
    static constexpr int k_steps = row_bytes / Arithmetic::bytes_per_step;
    static constexpr bool reads_ahead = Arithmetic::reads_ahead;

    // The epilogue takes a few rows of every warp at a time.
    static constexpr int warp_slice_rows = Arithmetic::rows_per_slice, slices = warp_m / warp_slice_rows;
    static constexpr int slice_rows = warps_m * warp_slice_rows, slice_pitch = n + 8;
    using Output = TileStore<T, TileShape<slice_rows, n, slice_pitch, threads, slices, 2>>;

    static_assert(row_bytes == 64 || row_bytes == 128, "the swizzle is made for rows of 64 or 128 bytes");
    static_assert(m % row_pass == 0 && n % row_pass == 0, "every pass of the copies must be whole");
    static_assert(row_pass % 8 == 0, "rows that one thread copies must share their swizzle");
    static_assert(warp_m % warp_slice_rows == 0, "a warp's rows must be whole slices");
    static_assert(!reads_ahead || k_steps % 2 == 0, "the two buffers must meet the same steps in every stage");
    static_assert(n <= threads, "a thread folds one channel");
    static_assert(stages >= 2, "one stage is read while another is filled");
};

// What the epilogue keeps in the operands' memory: a slice of the accumulators at the beginning, the residual under way at
// the end. A reduction of few steps never reaches the end, and the residual can be under way beside the operands.
template <class Traits>
struct ImplicitGemmEpilogue {
    static constexpr int operand_bytes = Traits::stages * Traits::stage_bytes;
    static constexpr int slice_bytes = Traits::slice_rows * Traits::slice_pitch * 4;
    static constexpr int slots_bytes = sizeof(typename Traits::Output::ResidualSlots);
    static_assert(slice_bytes + slots_bytes < operand_bytes, "the epilogue must fit the operands' memory");
    static constexpr int untouched_after_steps = (operand_bytes - slots_bytes) / Traits::stage_bytes;

    float accumulators[slice_bytes / 4];
    unsigned char between[operand_bytes - slice_bytes - slots_bytes];
    typename Traits::Output::ResidualSlots residual;
};

template <class Traits>
struct ImplicitGemmShared {
    union {
        alignas(128) unsigned char stages[Traits::stages][Traits::stage_bytes];
        ImplicitGemmEpilogue<Traits> epilogue;
    };
    RowPlace places[Traits::m];  // in the order in which slices take the rows
    ChannelFold folds[Traits::n];
};

// Adds a chunk of float32 sums to the total and starts the next. Arithmetics that sum on the CUDA cores take 64 products a
// chunk: one running sum over thousands of products has several times the error.
template <int Count>
__device__ __forceinline__ void add_chunk(float (&total)[Count], float (&chunk)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        total[i] += chunk[i];
        chunk[i] = 0;
    }
}

// Where a 16-byte chunk lies within its row: chunks of one column in eight neighbouring rows lie in distinct banks, so that
// both the copies and load_matrices are free of conflicts.
template <int RowBytes>
__device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
    return chunk ^ (RowBytes == 128 ? row % 8 : row / 2 % 4);
}

struct GemmBlock {
    int first_row, tile_n, split;
    int group, first_column;  // first_column counts within the group
    int columns;              // how many of the tile's columns exist

    // Column tiles run fastest over the grid: blocks that share activations run together and find them in the L2.
    template <class Traits>
    static __device__ GemmBlock of(const ImplicitGemmArgs& args) {
        const int block = static_cast<int>(device::block_x());
        const int tile = args.tiles_n.quotient(block), tile_n = args.tiles_n.remainder(block);
        const int first_column = args.tiles_per_group.remainder(tile_n) * Traits::n;
        const int remaining = args.k_per_group - first_column;
        return {.first_row = args.tiles_m.remainder(tile) * Traits::m,
                .tile_n = tile_n,
                .split = args.tiles_m.quotient(tile),
                .group = args.tiles_per_group.quotient(tile_n),
                .first_column = first_column,
                .columns = remaining < Traits::n ? remaining : Traits::n};
    }

    __device__ int first_channel(const ImplicitGemmArgs& args) const { return group * args.k_per_group + first_column; }
};

// Copies the operands of one main-loop step after another into shared memory.
template <class Traits, template <int> class Rows>
class OperandLoader {
    using T = typename Traits::Value;

   public:
    __device__ OperandLoader(const ImplicitGemmArgs& args, const GemmBlock& block, int first_step, uint32_t shared)
        : args_(args) {
        const int row = device::thread_x() / Traits::chunks_per_row, chunk = device::thread_x() % Traits::chunks_per_row;
        const int first_value = chunk * Traits::values_per_chunk;
        all_values_ = args.c_per_group - first_value;
        last_values_ = Traits::k - first_value;
        weight_columns_ = block.columns - row;
        destination_ = shared + row * Traits::row_bytes + swizzle<Traits::row_bytes>(row, chunk) * 16;
        rows_.start(args.x, block.first_row + row, Traits::row_pass);

        const int tap = args.channel_steps.quotient(first_step), c = args.channel_steps.remainder(first_step) * Traits::k;
        const int r = args.x.s.quotient(tap), s = args.x.s.remainder(tap);
        const int64_t x_tap = r * args.x.dil_h.value * args.x.h_bytes + s * args.x.dil_w.value * args.x.w_bytes;
        const int64_t first_channel = static_cast<int64_t>(block.group) * args.c_per_group + c;
        const FilterStrides& filter = args.conv.weight_strides;
        const int64_t first_weight = (block.first_channel(args) + row) * filter.k + r * filter.r + s * filter.s + c;
        values_ = all_values_ - c;
        walk_ = {.r = r,
                 .s = s,
                 .x = static_cast<const char*>(args.conv.x) + x_tap + first_channel * sizeof(T) + chunk * 16,
                 .weight = static_cast<const char*>(args.conv.weight) + first_weight * sizeof(T) + chunk * 16};
        rows_.enter_tap(args.x, walk_);
    }

    // Starts the copies of the walk's step into a stage, and walks on.
    __device__ __forceinline__ void load(uint32_t stage) {
        const uint32_t destination = destination_ + stage;
#pragma unroll
        for (int i = 0; i < Traits::x_rows; ++i) {
            copy_chunk(destination + i * Traits::row_pass * Traits::row_bytes, rows_.source(i, walk_),
                       rows_.is_inside(i) ? values_ : 0);
        }
#pragma unroll
        for (int i = 0; i < Traits::weight_rows; ++i) {
            copy_chunk(destination + Traits::weight_start + i * Traits::row_pass * Traits::row_bytes,
                       walk_.weight + i * Traits::row_pass * args_.weight_k_bytes,
                       i * Traits::row_pass < weight_columns_ ? values_ : 0);
        }
        advance();
    }

   private:
    // Values beyond `values` are written as zeros.
    static __device__ __forceinline__ void copy_chunk(uint32_t destination, const char* source, int values) {
#pragma unroll
        for (int i = 0; i < 16 / Traits::access_bytes; ++i) {
            device::copy_async<Traits::access_bytes>(destination + i * Traits::access_bytes,
                                                     source + i * Traits::access_bytes,
                                                     i * Traits::values_per_access < values);
        }
    }

    __device__ __forceinline__ void advance() {
        const bool next_tap = values_ <= last_values_;
        const bool next_row = next_tap && walk_.s == args_.last_s;
        const WalkSteps& steps = args_.walk_steps[next_tap + next_row];
        walk_.x += steps.x;
        walk_.weight += steps.weight;
        values_ = next_tap ? all_values_ : values_ - Traits::k;
        walk_.s = next_row ? 0 : walk_.s + next_tap;
        walk_.r += next_row;
        rows_.advance(args_.x, walk_, next_tap, next_row);
    }

    const ImplicitGemmArgs& args_;
    uint32_t destination_;
    int values_;  // channels of the group from this thread's chunk on: in this step, at a tap's first one
    int all_values_;
    int last_values_;     // as many as this, or fewer, are left in a tap's last step
    int weight_columns_;  // columns from this thread's first weight row to the last that exists
    Walk walk_;
    Rows<Traits::x_rows> rows_;
};

// Row of the tile that is row `index` in the order of the slices: slice i holds the i-th few rows of every warp.
template <class Traits>
__device__ __forceinline__ int row_of_slice_order(int index) {
    constexpr int rows = Traits::warp_slice_rows;
    const int slice = index / Traits::slice_rows, within = index % Traits::slice_rows;
    return within / rows * Traits::warp_m + slice * rows + within % rows;
}

template <class Traits>
__device__ __forceinline__ void prepare_tables(const ImplicitGemmArgs& args, const GemmBlock& block,
                                               ImplicitGemmShared<Traits>& shared) {
    const int thread = device::thread_x();
    const Epilogue& epilogue = args.conv.epilogue;
    const ChannelVectors<typename Traits::Value> vectors(epilogue, block.first_channel(args) + thread,
                                                         thread < block.columns);
    for (int i = thread; i < Traits::m; i += Traits::threads) {
        const int row = block.first_row + row_of_slice_order<Traits>(i);
        shared.places[i] = place_of_pixel(args.conv, args.x.output.pixel_of_row(row));
    }
    if (thread < Traits::n) shared.folds[thread] = vectors.fold(epilogue);
}

// Which stage is read and which is filled, as offsets in bytes.
template <class Traits>
class StageRing {
   public:
    __device__ uint32_t read() const { return read_; }
    __device__ uint32_t write() const { return write_; }
    __device__ void next_read() { read_ = after(read_); }
    __device__ void next_write() { write_ = after(write_); }

   private:
    static constexpr uint32_t stage_bytes = Traits::stage_bytes, end = Traits::stages * stage_bytes;
    static __device__ uint32_t after(uint32_t stage) { return stage + stage_bytes == end ? 0 : stage + stage_bytes; }

    uint32_t read_ = 0, write_ = end - stage_bytes;
};

// Starts the copies of the step that is stages - 1 ahead. Groups are committed even when empty, so that the number under way
// is always the same.
template <class Traits, class Loader>
__device__ __forceinline__ void load_ahead(Loader& loader, StageRing<Traits>& ring, int step, int steps) {
    if (step + Traits::stages - 1 < steps) loader.load(ring.write());
    device::commit_copies();
    ring.next_write();
}

// The stage that is read next has landed, and every warp has read the last of the stage that is written next.
template <class Traits>
__device__ __forceinline__ void next_stage() {
    device::wait_copies<Traits::stages - 2>();
    device::sync_threads();
}

// The main loop: each step reads one stage while the copies of the next ones are under way. Within a step a part is read
// while the one before it is multiplied, across the end of the stage too.
template <class Traits, class Loader>
__device__ __forceinline__ void multiply_reading_ahead(Loader& loader, typename Traits::Math& math, int steps) {
    StageRing<Traits> ring;
    next_stage<Traits>();
    math.read(0, ring.read(), 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int k = 0; k < Traits::k_steps; ++k) {
            if (k == Traits::k_steps - 1) {
                next_stage<Traits>();
                ring.next_read();
            }
            math.read((k + 1) % 2, ring.read(), (k + 1) % Traits::k_steps);
            if (k == 0) load_ahead(loader, ring, step, steps);
            math.multiply(k % 2);
        }
    }
}

// The same for an arithmetic whose registers do not suffice for a second buffer, and whose products take so long that
// the warps hide each other's reads.
template <class Traits, class Loader>
__device__ __forceinline__ void multiply_in_turn(Loader& loader, typename Traits::Math& math, int steps) {
    StageRing<Traits> ring;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        next_stage<Traits>();
        load_ahead(loader, ring, step, steps);
#pragma unroll
        for (int k = 0; k < Traits::k_steps; ++k) {
            math.read(0, ring.read(), k);
            math.multiply(0);
        }
        ring.next_read();
        if (step % Traits::steps_per_chunk == Traits::steps_per_chunk - 1) math.end_chunk();
    }
    math.end_chunk();
}

// Starts the copies of the first steps, as many as there are stages to fill.
template <class Traits, class Loader>
__device__ __forceinline__ void load_first(Loader& loader, int steps) {
#pragma unroll
    for (int stage = 0; stage < Traits::stages - 1; ++stage) {
        if (stage < steps) loader.load(stage * Traits::stage_bytes);
        device::commit_copies();
    }
}

template <class Traits>
__device__ __forceinline__ typename Traits::Output output_of(const ImplicitGemmArgs& args, const GemmBlock& block,
                                                             const ImplicitGemmShared<Traits>& shared) {
    return {args.conv, shared.places, shared.folds, {block.first_channel(args), block.columns}, shared.epilogue.residual};
}

template <class Traits>
__device__ __forceinline__ void store_slices(const ImplicitGemmArgs& args, const GemmBlock& block,
                                             ImplicitGemmShared<Traits>& shared, const typename Traits::Math& math,
                                             typename Traits::Output& output) {
    const int warp_m = device::warp() / Traits::warps_n, warp_n = device::warp() % Traits::warps_n;
    float* accumulators = shared.epilogue.accumulators;
    float* warp_rows = accumulators + warp_m * Traits::warp_slice_rows * Traits::slice_pitch + warp_n * Traits::warp_n;
#pragma unroll 1
    for (int slice = 0; slice < Traits::slices; ++slice) {
        math.write(slice, warp_rows, Traits::slice_pitch);
        device::sync_threads();
        Traits::Math::repair(args, block, accumulators, Traits::slice_pitch, Traits::slice_rows,
                             [&](int row) { return row_of_slice_order<Traits>(slice * Traits::slice_rows + row); });
        output.store(slice, accumulators);
        device::sync_threads();
    }
}

// Writes the tile's share of the sums to the workspace, [splits][tiles_m * m][tiles_n * n] float32, for split_k to add up.
template <class Traits>
__device__ __forceinline__ void store_partial_sums(const ImplicitGemmArgs& args, const GemmBlock& block,
                                                   const typename Traits::Math& math) {
    const int warp_m = device::warp() / Traits::warps_n, warp_n = device::warp() % Traits::warps_n;
    const int64_t pitch = int64_t{args.tiles_n.value} * Traits::n;
    const int64_t first_row = int64_t{block.split} * args.tiles_m.value * Traits::m + block.first_row;
    float* tile = args.conv.workspace + first_row * pitch + block.tile_n * Traits::n;
    float* warp_rows = tile + warp_m * Traits::warp_m * pitch + warp_n * Traits::warp_n;
#pragma unroll
    for (int slice = 0; slice < Traits::slices; ++slice) {
        math.write(slice, warp_rows + slice * Traits::warp_slice_rows * pitch, pitch);
    }
    Traits::Math::repair(args, block, tile, pitch, Traits::m, [](int row) { return row; });
}

template <class Traits, template <int> class Rows>
__global__ void __launch_bounds__(Traits::threads, Traits::tile.blocks_per_multiprocessor)
    implicit_gemm(const __grid_constant__ ImplicitGemmArgs args) {
    auto& shared = device::shared_storage<ImplicitGemmShared<Traits>>();
    const GemmBlock block = GemmBlock::of<Traits>(args);
    const bool is_split = args.steps_per_split < args.steps;
    const int first_step = block.split * args.steps_per_split, remaining = args.steps - first_step;
    const int steps = remaining < args.steps_per_split ? remaining : args.steps_per_split;

    // Operands are asked for before anything else is done, so that the tables are made while they are under way.
    OperandLoader<Traits, Rows> loader(args, block, first_step, device::shared_address(&shared.stages[0][0]));
    load_first<Traits>(loader, steps);
    prepare_tables(args, block, shared);
    // Asked for once more behind the main loop, in which a predicate kept would be one too many.
    const auto residual_beside_operands = [&] { return args.steps <= ImplicitGemmEpilogue<Traits>::untouched_after_steps; };
    if (!is_split && residual_beside_operands()) {
        device::sync_threads();
        output_of(args, block, shared).start();
    }

    typename Traits::Math math(&shared.stages[0][0]);
    if constexpr (Traits::reads_ahead) {
        multiply_reading_ahead<Traits>(loader, math, steps);
    } else {
        multiply_in_turn<Traits>(loader, math, steps);
    }
    // The epilogue takes over the stages.
    device::wait_copies<0>();
    device::sync_threads();

    if (is_split) return store_partial_sums<Traits>(args, block, math);
    typename Traits::Output output = output_of(args, block, shared);
    if (!residual_beside_operands()) output.start();
    store_slices(args, block, shared, math, output);
}

}  // namespace fused_cna::kernels::implicit_gemm
