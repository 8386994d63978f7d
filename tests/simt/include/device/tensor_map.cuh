// Replaces csrc/device/tensor_map.cuh when the kernels are compiled for the simulator.
#pragma once

#include <cstdint>

#include <simt/tensor_maps.h>

#include "device/map_geometry.h"

namespace fused_cna::device {

// Opaque to kernels, like the hardware's: only bulk copies look inside.
struct alignas(64) TensorMap {
    static constexpr uint64_t encoded = 0x70616D726F736E74;  // "tnsormap"

    MapGeometry geometry;
    uint64_t state = 0;  // `encoded`, or any other value where it was never encoded
};

inline bool has_tensor_maps() { return simt::has_tensor_maps(); }

inline const char* encode_map(const MapGeometry& geometry, TensorMap& map) {
    if (const char* refusal = simt::find_map_refusal(geometry)) return refusal;
    map.geometry = geometry;
    map.state = TensorMap::encoded;
    return nullptr;
}

}  // namespace fused_cna::device
