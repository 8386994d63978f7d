#pragma once
#include "device/map_geometry.h"

namespace simt {

// The driver's part of tensor maps. CUDA Driver API, "Tensor Map Object Managment": null where it encodes such a map, or the
// broken requirement, with its numbers. The text lasts until the thread's next refusal.
const char* find_map_refusal(const fused_cna::device::MapGeometry& geometry);

bool has_tensor_maps();

// For tests: makes the driver one without tensor maps, until it is undone.
void refuse_tensor_maps(bool refuse);

// For tests: makes the driver refuse every map, until it is undone.
void fail_encoding(bool fail);

}  // namespace simt
