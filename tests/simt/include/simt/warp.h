#pragma once

namespace simt { inline constexpr int warp_lanes = 32; }  // namespace simt
