// Assumptions of the Hopper kernel that only a GPU can confirm; tests/gpu/hopper_probe.cu checks them. Where one is wrong,
// setting it to false keeps results right.
#pragma once

namespace fused_cna::implicit_gemm_sm90 {

// The driver takes the corners of an im2col map in the order w, h. If false, they are passed swapped.
inline constexpr bool corners_begin_with_w = true;

// Bulk copies lay operands out as wgmma descriptors read them. If false, the gather copies x and the weight.
inline constexpr bool maps_bring_operands = true;

// Products by descriptors are right. If false, the plan does not use this kernel.
inline constexpr bool multiplies_right = true;

}  // namespace fused_cna::implicit_gemm_sm90
