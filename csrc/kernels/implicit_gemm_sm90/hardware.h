// What only a GPU can say of the Hopper kernel, as it is assumed until tests/gpu/hopper_probe.cu has asked one. Set to
// false, each keeps results right where the assumption was wrong.
#pragma once

namespace fused_cna::implicit_gemm_sm90 {

// The driver takes the corners of an im2col map in the order w, h. If not, they are handed over swapped.
inline constexpr bool corners_begin_with_w = true;

// Bulk copies lay operands out as descriptors of wgmma read them. If not, the gather brings x and the weight.
inline constexpr bool maps_bring_operands = true;

// Products by descriptors are right. If not, the plan leaves this kernel out.
inline constexpr bool multiplies_right = true;

}  // namespace fused_cna::implicit_gemm_sm90
