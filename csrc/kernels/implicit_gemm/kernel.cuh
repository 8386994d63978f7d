// Dense and grouped convolution as an implicit GEMM: cp.async copies the operands into several stages of swizzled shared
// memory; tensor_cores.cuh or cuda_cores.cuh multiplies them. Compute capability 8.0 and newer. Channels of x and of the
// weight must be dense (stride 1).
#pragma once

#include <device/device.cuh>

#include "kernels/common/start.cuh"
#include "kernels/implicit_gemm/operands.cuh"

namespace fused_cna::implicit_gemm {

// The epilogue's use of the operands' memory: a slice of the accumulators at the start, the residual in flight at the end. A
// reduction of few steps never uses the end, so the residual can be loaded beside the operands.
template <class Traits>
struct EpilogueMemory {
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
struct Shared {
    union {
        alignas(128) unsigned char stages[Traits::stages][Traits::stage_bytes];
        EpilogueMemory<Traits> epilogue;
    };
    RowPlace places[Traits::m];  // in slice order
    ChannelFold folds[Traits::n];
};

// The tile's row that has `index` in slice order: slice i holds the i-th few rows of every warp.
template <class Traits>
__device__ __forceinline__ int row_of_slice_order(int index) {
    constexpr int rows = Traits::warp_slice_rows;
    const int slice = index / Traits::slice_rows, within = index % Traits::slice_rows;
    return within / rows * Traits::warp_m + slice * rows + within % rows;
}

template <class Traits>
__device__ __forceinline__ void prepare_places(const Args& args, const Block& block, Shared<Traits>& shared) {
    constexpr int turns = (Traits::m + Traits::threads - 1) / Traits::threads;
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
        const int i = device::thread_x() + turn * Traits::threads, row = block.first_row + row_of_slice_order<Traits>(i);
        if (Traits::m % Traits::threads != 0 && i >= Traits::m) break;
        shared.places[i] = place_of_pixel(args.conv, args.x.output.pixel_of_row(row));
    }
}

// The stages being read and written, as offsets in bytes.
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

// Starts the copies for the step that is stages - 1 ahead. Empty groups are committed too, so that the number in flight is
// always the same.
template <class Traits, class Loader>
__device__ __forceinline__ void load_ahead(Loader& loader, StageRing<Traits>& ring, int step, int steps) {
    if (step + Traits::stages - 1 < steps) loader.load(ring.write());
    device::commit_copies();
    ring.next_write();
}

// Waits until the next stage to read has landed and every warp has finished reading the next stage to write.
template <class Traits>
__device__ __forceinline__ void next_stage() {
    device::wait_copies<Traits::stages - 2>();
    device::sync_threads();
}

// The main loop: each step reads one stage while the next ones are being copied. Within a step, one part is read while the
// previous one is multiplied, also across the end of a stage.
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

// The same for arithmetic that lacks registers for a second buffer, and whose products take long enough for the warps to
// hide each other's reads.
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

// Starts the copies of the first steps, into stages `First` to `End` (exclusive). The last group is left open.
template <class Traits, int First, int End, class Loader>
__device__ __forceinline__ void load_first(Loader& loader, int steps) {
#pragma unroll
    for (int stage = First; stage < End; ++stage) {
        if (stage > 0) device::commit_copies();
        if (stage < steps) loader.load(stage * Traits::stage_bytes);
    }
}

template <class Traits>
__device__ __forceinline__ typename Traits::Output output_of(const Args& args, const Block& block,
                                                             const Shared<Traits>& shared) {
    return {args.conv, shared.places, shared.folds, {block.first_channel(args), block.columns}, shared.epilogue.residual};
}

template <class Traits>
__device__ __forceinline__ void store_slices(const Args& args, const Block& block, Shared<Traits>& shared,
                                             const typename Traits::Math& math, typename Traits::Output& output) {
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

// Writes the tile's partial sums to the workspace, [splits][tiles_m * m][tiles_n * n] float32, for split_k to add up.
template <class Traits>
__device__ __forceinline__ void store_partial_sums(const Args& args, const Block& block, const typename Traits::Math& math) {
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
    implicit_gemm(const __grid_constant__ Args args) {
    auto& shared = device::shared_storage<Shared<Traits>>();
    const Block block = Block::of<Traits>(args);
    const bool is_split = args.steps_per_split < args.steps;
    const int first_step = block.split * args.steps_per_split, remaining = args.steps - first_step;
    const int steps = remaining < args.steps_per_split ? remaining : args.steps_per_split;

    OperandLoader<Traits, Rows> loader(args, block, first_step, device::shared_address(&shared.stages[0][0]));
    if constexpr (prepares_ahead) prepare_places(args, block, shared);
    await_kernels_ahead(args.conv, Traits::threads);
    // First what the first products wait for, then whatever has a long latency.
    load_first<Traits, 0, 1>(loader, steps);
    const FoldTable<typename Traits::Value> folds(args.conv.epilogue, block.first_channel(args), Traits::n, block.columns);
    load_first<Traits, 1, Traits::stages - 1>(loader, steps);
    if constexpr (!prepares_ahead) prepare_places(args, block, shared);
    // Evaluated again after the main loop, rather than kept in a predicate during it.
    const auto residual_beside_operands = [&] { return args.steps <= EpilogueMemory<Traits>::untouched_after_steps; };
    if (!is_split && residual_beside_operands()) {
        device::sync_threads();
        output_of(args, block, shared).start_in_open_group();
    }
    device::commit_copies();
    folds.store(shared.folds);

    typename Traits::Math math(&shared.stages[0][0]);
    if constexpr (Traits::reads_ahead) {
        multiply_reading_ahead<Traits>(loader, math, steps);
    } else {
        multiply_in_turn<Traits>(loader, math, steps);
    }
    // The epilogue reuses the stages' memory.
    device::wait_copies<0>();
    device::sync_threads();

    if (is_split) return store_partial_sums<Traits>(args, block, math);
    typename Traits::Output output = output_of(args, block, shared);
    if (!residual_beside_operands()) output.start();
    store_slices(args, block, shared, math, output);
}

}  // namespace fused_cna::implicit_gemm
