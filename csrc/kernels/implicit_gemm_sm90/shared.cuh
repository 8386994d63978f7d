// Shared memory of the Hopper kernel.
#pragma once

#include "kernels/implicit_gemm_sm90/operands.cuh"

namespace fused_cna::implicit_gemm_sm90 {

template <class Traits>
struct alignas(1024) Shared {
    // Operands in the layout of wgmma. After the main loop the sums that a cluster adds up take their place: 16 bytes of
    // every consumer thread, then the next 16.
    union {
        unsigned char stages[Traits::stages][Traits::stage_bytes];
        device::Vector16 sums[Traits::is_pingpong ? 1 : Traits::blocks * Traits::n / 8][Traits::consumers * 128];
    };
    // The residual after its load, and in its place the output before its store.
    unsigned char staged[Traits::consumers][Traits::slices][Traits::slice_bytes];
    float folds[Traits::consumers][3][Traits::n];  // scale, offset, beta
    device::PhaseBarrier full[Traits::stages], empty[Traits::stages], landed[Traits::stages];
    device::PhaseBarrier residual[Traits::consumers], turn[2];

    __device__ uint32_t stage_address(int stage) { return device::shared_address(&stages[stage][0]); }
};

}  // namespace fused_cna::implicit_gemm_sm90
