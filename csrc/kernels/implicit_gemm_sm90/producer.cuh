// The producer warpgroup. x comes in one of three ways: tiled or im2col by bulk copies, or gathered by cp.async. All fill
// the same stages.
#pragma once

#include "kernels/implicit_gemm_sm90/shared.cuh"

namespace fused_cna::implicit_gemm_sm90 {

// Where maps copy all operands and none needs rounding: one thread starts all copies.
template <class Traits>
__device__ __forceinline__ void copy_by_maps(const Args& args, Shared<Traits>& shared) {
    const Steps steps = Steps::of(args);
    Ring<Traits::stages> ring;
    for (TileWalk walk = TileWalk::of(args); walk.is_inside(args); walk.next()) {
        MapLoader<Traits> maps(args, block_of_tile<Traits>(args, walk.tile), steps.first);
        for (int step = 0; step < steps.count; ++step, ring.next()) {
            device::wait(shared.empty[ring.stage], ring.parity ^ 1);
            device::arrive_expecting(shared.full[ring.stage], MapLoader<Traits>::step_bytes(args));
            maps.load(shared.stage_address(ring.stage), shared.full[ring.stage]);
        }
    }
}

// Every thread copies, or rounds, its chunks of each stage. `behind` stages of copies are in flight before the first is
// waited for.
template <class Traits, template <int> class Rows>
class ThreadCopies {
    static constexpr int behind = Traits::stages > 3 ? Traits::stages - 3 : 1;
    using Loader = gather::OperandLoader<Traits, Rows>;

   public:
    __device__ ThreadCopies(const Args& args, Shared<Traits>& shared) : args_(args), shared_(shared) {}

    __device__ __forceinline__ void run() {
        const Steps steps = Steps::of(args_);
        int under_way = 0;
        for (TileWalk walk = TileWalk::of(args_); walk.is_inside(args_); walk.next()) {
            const gather::Block block = block_of_tile<Traits>(args_, walk.tile);
            Loader loader(args_, block, steps.first, shared_.stage_address(0));
            MapLoader<Traits> maps(args_, block, steps.first);
            for (int step = 0; step < steps.count; ++step) {
                start(loader, maps);
                if (++under_way <= behind) continue;
                device::wait_copies<behind>();
                finish();
                --under_way;
            }
        }
        device::wait_copies<0>();
        for (; under_way > 0; --under_way) finish();
    }

   private:
    // The barrier that counts bulk copies: a stage that must be rounded is not full when it has landed.
    __device__ device::PhaseBarrier& landed(int stage) {
        return Traits::rounds ? shared_.landed[stage] : shared_.full[stage];
    }

    __device__ __forceinline__ void start(Loader& loader, MapLoader<Traits>& maps) {
        device::wait(shared_.empty[started_.stage], started_.parity ^ 1);
        if (device::thread_x() == 0) {
            device::arrive_expecting(landed(started_.stage), MapLoader<Traits>::step_bytes(args_));
            maps.load(shared_.stage_address(started_.stage), landed(started_.stage));
        }
        const uint32_t offset = started_.stage * Traits::stage_bytes;
        if (!args_.x_by_map) loader.load_x(offset);
        if (!args_.weight_by_map) loader.load_weight(offset);
        loader.advance();
        device::commit_copies();
        started_.next();
    }

    __device__ __forceinline__ void finish() {
        if constexpr (Traits::rounds) {
            device::wait(shared_.landed[finished_.stage], finished_.parity);
            round_chunks(shared_.stage_address(finished_.stage));
        }
        device::fence_async_proxy();
        device::arrive(shared_.full[finished_.stage]);
        finished_.next();
    }

    // Rounds the chunks that this thread would gather.
    static __device__ __forceinline__ void round_chunks(uint32_t stage) {
        const int row = device::thread_x() / Traits::chunks_per_row, chunk = device::thread_x() % Traits::chunks_per_row;
        const uint32_t first = stage + row * Traits::row_bytes + gather::swizzle<Traits::row_bytes>(row, chunk) * 16;
#pragma unroll 4
        for (int i = 0; i < Traits::x_rows + Traits::weight_rows; ++i) {
            const uint32_t address = first + i * Traits::row_pass * Traits::row_bytes;
            device::Vector16 values = device::load_shared(address);
#pragma unroll
            for (uint32_t& word : values.words) word = device::round_to_tf32(word);
            device::store_shared(address, values);
        }
    }

    const Args& args_;
    Shared<Traits>& shared_;
    Ring<Traits::stages> started_, finished_;
};

// Arrivals at a stage's barrier until the stage is full.
template <class Traits>
__device__ __forceinline__ int arrivals_of_full(const Args& args) {
    if (Traits::rounds) return 128;
    return args.x_by_map ? 1 : 129;  // every thread, and a second arrival of the thread that starts the bulk copies
}

template <class Traits, template <int> class Rows>
__device__ __forceinline__ void copy_operands(const Args& args, Shared<Traits>& shared) {
    if (args.x_by_map && !Traits::rounds) {
        if (device::thread_x() == 0) copy_by_maps<Traits>(args, shared);
    } else if constexpr (Traits::tile.gathers()) {
        ThreadCopies<Traits, Rows>(args, shared).run();
    }
}

}  // namespace fused_cna::implicit_gemm_sm90
