#pragma once
#include "device/map_geometry.h"

namespace simt {

// The driver, as far as tensor maps go. CUDA Driver API, "Tensor Map Object Managment": null where it encodes such a map, or
// the requirement that is broken, with its numbers. The text lasts until the thread's next refusal.
const char* find_map_refusal(const fused_cna::device::MapGeometry& geometry);

bool has_tensor_maps();

// For tests: from now on, until it is taken back, the driver is one that has no tensor maps.
void refuse_tensor_maps(bool refuse);

// For tests: likewise, it has them, and encodes none.
void fail_encoding(bool fail);

}  // namespace simt
