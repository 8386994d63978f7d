// Tensor maps of a launch. Host only.
#pragma once

#include <optional>

#include <device/tensor_map.cuh>

#include "args.h"
#include "plan/device.h"

namespace fused_cna::implicit_gemm_sm90 {

// What a box holds: rows of x and of the weight, or a slice of a warpgroup's output.
struct MapTile {
    int m, n;
    int rows, columns;
};

// How bulk copies see the operands; none where they cannot. `conv` has strides of 0 where there is but one element.
using Geometry = std::optional<device::MapGeometry>;
Geometry x_geometry(const ConvArgs& conv, bool is_tiled, const MapTile& tile);
Geometry weight_geometry(const ConvArgs& conv, const MapTile& tile);
Geometry output_geometry(const ConvArgs& conv, const void* data, const Strides& strides, const MapTile& tile);

// The map of a geometry, encoded when it is first asked for: that costs the host microseconds, and layers ask for the same
// maps again and again. False where there is none. Safe to call from several threads.
bool find_map(const Geometry& geometry, device::TensorMap& map);

// For kernels/run, which says what they are.
RefusedMaps refused_maps();
bool has_tensor_maps();

}  // namespace fused_cna::implicit_gemm_sm90
