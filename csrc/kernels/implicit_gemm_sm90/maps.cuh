// The tensor maps of a launch. Host only.
#pragma once

#include <optional>

#include <device/tensor_map.cuh>

#include "args.h"
#include "plan/device.h"

namespace fused_cna::implicit_gemm_sm90 {

// The size of a box: m or n rows of x or of the weight; rows x columns, a slice, of a warpgroup's output.
struct MapTile {
    int m, n;
    int rows, columns;
};

// An operand's map geometry, if bulk copies can access it. `conv` has strides of 0 in dimensions of one element.
using Geometry = std::optional<device::MapGeometry>;
Geometry x_geometry(const ConvArgs& conv, bool is_tiled, const MapTile& tile);
Geometry weight_geometry(const ConvArgs& conv, const MapTile& tile);
Geometry output_geometry(const ConvArgs& conv, const void* data, const Strides& strides, const MapTile& tile);

// The map of a geometry; false where there is none. Encoding costs the host microseconds and layers reuse their maps, so
// maps are cached. Safe to call from several threads.
bool find_map(const Geometry& geometry, device::TensorMap& map);

// Declared and documented in kernels/run.
RefusedMaps refused_maps();
bool has_tensor_maps();

}  // namespace fused_cna::implicit_gemm_sm90
