// What the plan's estimates know of a device, and the devices that can be planned for without having one.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string_view>

namespace fused_cna {

struct DeviceInfo {
    int compute_major = 0, compute_minor = 0;
    int multiprocessors = 0;
    int64_t shared_per_multiprocessor = 0, shared_per_block = 0;  // bytes; the second is the limit with opt-in
    double clock_ghz = 0;
    double bandwidth_gbs = 0;  // device memory, datasheet

    auto operator<=>(const DeviceInfo&) const = default;
};

// Multiply-adds per clock and multiprocessor of mma.sync with float32 accumulation, 16-bit operands; tf32 runs at half.
// NVIDIA's architecture whitepapers; on 9.0 and newer mma.sync reaches about five eighths of what wgmma does.
constexpr double mma_per_clock(const DeviceInfo& device) {
    switch (device.compute_major * 10 + device.compute_minor) {
        case 80: return 1024;
        case 86: return 256;
        case 89: return 512;
        default: return 1280;
    }
}

// Multiply-adds per clock and multiprocessor of the float32 CUDA cores.
constexpr double fma_per_clock(const DeviceInfo& device) {
    return device.compute_major == 8 && device.compute_minor == 0 ? 64 : 128;
}

struct NamedDevice {
    std::string_view name;
    DeviceInfo info;
};

// Datasheet values; shared memory from the CUDA programming guide's table of compute capabilities.
inline constexpr std::array<NamedDevice, 6> named_devices{{
    {"A100", {8, 0, 108, 164 << 10, 163 << 10, 1.41, 1555}},
    {"L4", {8, 9, 58, 100 << 10, 99 << 10, 2.04, 300}},
    {"RTX 4090", {8, 9, 128, 100 << 10, 99 << 10, 2.52, 1008}},
    {"H100", {9, 0, 132, 228 << 10, 227 << 10, 1.83, 3350}},
    {"H200", {9, 0, 132, 228 << 10, 227 << 10, 1.83, 4800}},
    {"B200", {10, 0, 148, 228 << 10, 227 << 10, 1.85, 8000}},
}};

}  // namespace fused_cna
