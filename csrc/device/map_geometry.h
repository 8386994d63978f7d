// What a tensor map says: how a bulk copy walks a tensor in global memory, and how it lays it out in shared memory.
// Portable.
#pragma once

#include <array>
#include <compare>
#include <cstdint>

#include "problem.h"

namespace fused_cna::device {

// Dimensions begin with the one that is dense in memory. A copy brings a box of `box` elements, and zeros for those that lie
// outside of the tensor; it writes those that lie inside. CUDA Driver API, cuTensorMapEncodeTiled, cuTensorMapEncodeIm2col.
struct MapGeometry {
    static constexpr int most_dimensions = 4;

    const void* address = nullptr;
    DType dtype = DType::float32;
    int rank = 0;
    std::array<int64_t, most_dimensions> sizes{};    // in elements
    std::array<int64_t, most_dimensions> strides{};  // in bytes; the first is that of an element, and is not asked for
    std::array<int, most_dimensions> box{};          // tiled: elements of each dimension
    int swizzle_bytes = 0;                           // of a row of the box: 64 or 128

    // Im2col of {C, W, H, N}: a box of so many channels of so many pixels. The pixels are walked along W, then H, then N, by
    // the steps, from the lower corner of an image to its far corner and `upper` (not positive behind it).
    bool is_im2col = false;
    int channels = 0, pixels = 0;
    int lower_w = 0, lower_h = 0, upper_w = 0, upper_h = 0;
    int step_w = 1, step_h = 1;

    auto operator<=>(const MapGeometry&) const = default;
};

}  // namespace fused_cna::device
