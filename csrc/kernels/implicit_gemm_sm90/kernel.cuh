// Dense and grouped convolution as an implicit GEMM for compute capability 9.0: persistent blocks of one producer warpgroup
// that copies and one or two consumer warpgroups that multiply by wgmma. Channels of x and of the weight must be dense
// (stride 1).
#pragma once

#include <device/warpgroup.cuh>

#include "kernels/common/start.cuh"
#include "kernels/implicit_gemm_sm90/epilogue.cuh"
#include "kernels/implicit_gemm_sm90/producer.cuh"

namespace fused_cna::implicit_gemm_sm90 {

// Orders two pingpong warpgroups: each begins a tile once the other has waited at all barriers of the previous tile.
// Barriers tell phases apart only by parity, so a warpgroup that came too early would take an old phase for the one it waits
// for.
template <class Traits>
class Turn {
   public:
    __device__ Turn(Shared<Traits>& shared, const Group& group, int parity) : shared_(shared), group_(group) {
        if constexpr (Traits::is_pingpong) device::wait(shared.turn[group.index], parity ^ (group.index == 0));
    }
    __device__ void pass_on() const {
        if constexpr (Traits::is_pingpong) {
            if (group_.lane == 0) device::arrive(shared_.turn[1 - group_.index]);
        }
    }

   private:
    Shared<Traits>& shared_;
    const Group& group_;
};

// The main loop of a tile. A step's products are started, then the previous step's are waited for, which frees its stage.
// `meanwhile` is called once, while the first products run. `parity`: of the group's tiles.
template <class Traits, class Meanwhile>
__device__ __forceinline__ void multiply(Shared<Traits>& shared, const Group& group, Ring<Traits::stages>& ring, int steps,
                                         int parity, float (&sums)[Traits::blocks][Traits::n / 2],
                                         const Meanwhile& meanwhile) {
    constexpr int32_t block_step = 64 * Traits::row_bytes / 16;  // in the units of a descriptor
    const int first_row = Traits::is_pingpong ? 0 : group.index * Traits::rows;
    const auto release = [&](int stage) {
        if (group.lane == 0) device::arrive(shared.empty[stage]);
    };
    const Turn<Traits> turn(shared, group, parity);
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring.next()) {
        device::wait(shared.full[ring.stage], ring.parity);
        const uint32_t stage = shared.stage_address(ring.stage);
        const uint64_t x = device::matrix_descriptor(stage + first_row * Traits::row_bytes);
        const uint64_t weight = device::matrix_descriptor(stage + Traits::weight_start);
#pragma unroll
        for (auto& of_block : sums) device::hold_sums(of_block);
        device::fence_products();
#pragma unroll
        for (int k = 0; k < Traits::k_steps; ++k) {
#pragma unroll
            for (int block = 0; block < Traits::blocks; ++block) {
                device::multiply_async<typename Traits::Value, Traits::n>(sums[block], x + k * 2 + block * block_step,
                                                                          weight + k * 2, step > 0 || k > 0);
            }
        }
        device::commit_products();
        if (step == 0) {
            meanwhile();
        } else {
            device::wait_products<1>();
            release(previous);
        }
        previous = ring.stage;
    }
    turn.pass_on();
    device::wait_products<0>();
#pragma unroll
    for (auto& of_block : sums) device::hold_sums(of_block);
    release(previous);
}

template <class Traits>
__device__ __forceinline__ void multiply_and_finish(const Args& args, Shared<Traits>& shared, int index) {
    const Group group = Group::of(index);
    const Steps steps = Steps::of(args);
    Ring<Traits::stages> ring;
    TileWalk walk = TileWalk::of(args);
    if constexpr (Traits::is_pingpong) {
        walk.tile += index * walk.step;
        walk.step *= 2;
        ring.skip(index * steps.count);
    }
    int parity = 0;
    for (; walk.is_inside(args); walk.next(), parity ^= 1) {
        const gather::Block block = block_of_tile<Traits>(args, walk.tile);
        const int first_row = block.first_row + (Traits::is_pingpong ? 0 : index * Traits::rows);
        Epilogue<Traits> epilogue(args, group, shared, block, first_row);
        float sums[Traits::blocks][Traits::n / 2];
        multiply(shared, group, ring, steps.count, parity, sums, [&] { epilogue.ask_residual(); });
        if constexpr (Traits::is_pingpong) ring.skip(steps.count);
        epilogue.finish(sums, parity);
    }
    // Shared memory must exist until all of it has been read.
    if (group.leads()) device::wait_stores_read<0>();
    if constexpr (!Traits::is_pingpong) {
        if (args.split.value > 1) device::await_cluster();
    }
}

template <class Traits>
__device__ __forceinline__ void make_barriers(const Args& args, Shared<Traits>& shared) {
    constexpr int readers = Traits::is_pingpong ? 4 : 4 * Traits::consumers;  // warps
    if (device::thread_x() == 0) {
        if (args.x_by_map) device::prefetch_map(args.x_map);
        if (args.weight_by_map) device::prefetch_map(args.weight_map);
        if (args.residual_by_map) device::prefetch_map(args.residual_map);
        if (args.y_by_map) device::prefetch_map(args.y_map);
        for (int i = 0; i < Traits::stages; ++i) {
            device::init_barrier(shared.full[i], arrivals_of_full<Traits>(args));
            device::init_barrier(shared.empty[i], readers);
            device::init_barrier(shared.landed[i], 1);
        }
        for (auto& barrier : shared.residual) device::init_barrier(barrier, 1);
        for (auto& barrier : shared.turn) device::init_barrier(barrier, 4);
        device::publish_barriers();
    }
    device::sync_threads();
}

template <class Traits, template <int> class Rows>
__global__ void __launch_bounds__(Traits::block_threads, 1) implicit_gemm_sm90(const __grid_constant__ Args args) {
    if constexpr (device::is_hopper) {
        auto& shared = device::shared_storage<Shared<Traits>>();
        make_barriers(args, shared);
        await_kernels_ahead(args.conv, Traits::block_threads);
        const int warpgroup = device::warpgroup();
        // With a single consumer warpgroup there are enough registers.
        if (warpgroup == 0) {
            if constexpr (Traits::consumers == 2) device::give_registers<Traits::copying_registers>();
            copy_operands<Traits, Rows>(args, shared);
        } else {
            if constexpr (Traits::consumers == 2) device::take_registers<Traits::multiplying_registers>();
            multiply_and_finish<Traits>(args, shared, warpgroup - 1);
        }
    } else {
        device::stop();
    }
}

}  // namespace fused_cna::implicit_gemm_sm90
