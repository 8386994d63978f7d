// The contents of a tensor map: how a bulk copy walks a tensor in global memory, and how it lays it out in shared memory.
// Portable.
#pragma once

#include <array>
#include <compare>
#include <cstdint>

#include "problem.h"

namespace fused_cna::device {

// Dimensions begin with the one that is dense in memory. A copy reads a box of `box` elements, with zeros for those outside
// the tensor; a store writes only those inside. CUDA Driver API: cuTensorMapEncodeTiled, cuTensorMapEncodeIm2col.
struct MapGeometry {
    static constexpr int most_dimensions = 4;

    const void* address = nullptr;
    DType dtype = DType::float32;
    int rank = 0;
    std::array<int64_t, most_dimensions> sizes{};    // in elements
    std::array<int64_t, most_dimensions> strides{};  // in bytes; the first is an element's, and the driver does not take it
    std::array<int, most_dimensions> box{};          // tiled: elements in each dimension
    int swizzle_bytes = 0;                           // bytes of a row of the box: 64 or 128

    // Im2col of {C, W, H, N}: a box of `channels` channels of `pixels` pixels. Pixels advance along W, then H, then N, by
    // the steps, from each image's first pixel plus `lower` to its last pixel plus `upper`.
    bool is_im2col = false;
    int channels = 0, pixels = 0;
    int lower_w = 0, lower_h = 0, upper_w = 0, upper_h = 0;
    int step_w = 1, step_h = 1;

    auto operator<=>(const MapGeometry&) const = default;
};

}  // namespace fused_cna::device
