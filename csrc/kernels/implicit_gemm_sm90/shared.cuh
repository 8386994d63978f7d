// What the warpgroups of the Hopper kernel share.
#pragma once

#include "kernels/implicit_gemm_sm90/operands.cuh"

namespace fused_cna::implicit_gemm_sm90 {

template <class Traits>
struct alignas(1024) Shared {
    // Operands as the products take them. Sums that a cluster adds up take their place when all are multiplied: of each
    // thread that multiplies, 16 bytes after 16 bytes.
    union {
        unsigned char stages[Traits::stages][Traits::stage_bytes];
        device::Vector16 sums[Traits::is_pingpong ? 1 : Traits::blocks * Traits::n / 8][Traits::consumers * 128];
    };
    // The residual on its way from memory, and in its place the output on its way back.
    unsigned char staged[Traits::consumers][Traits::slices][Traits::slice_bytes];
    float folds[Traits::consumers][3][Traits::n];  // scale, offset, beta
    device::PhaseBarrier full[Traits::stages], empty[Traits::stages], landed[Traits::stages];
    device::PhaseBarrier residual[Traits::consumers], turn[2];

    __device__ uint32_t stage_address(int stage) { return device::shared_address(&stages[stage][0]); }
};

}  // namespace fused_cna::implicit_gemm_sm90
