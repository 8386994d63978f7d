// What the plan's estimates know of a device, and the named devices that can be planned for without one.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string_view>

#include "problem.h"

namespace fused_cna {

struct DeviceInfo {
    int compute_major = 0, compute_minor = 0;
    int multiprocessors = 0;
    int64_t shared_per_multiprocessor = 0, shared_per_block = 0;  // bytes; the second is the limit with opt-in
    double clock_ghz = 0;                                         // the highest
    double bandwidth_gbs = 0;                                     // device memory, datasheet
    bool is_geforce = false;
    // For compute capability 9.0: whether the kernels are compiled for sm_90a, and whether the driver encodes tensor maps.
    bool has_hopper_code = true, has_tensor_maps = true;

    auto operator<=>(const DeviceInfo&) const = default;
};

// How many tensor maps the driver refused, and the last reason (null where there was none). Kernels then run without,
// slower.
struct RefusedMaps {
    int64_t number = 0;
    const char* reason = nullptr;
};

// Like for_each_problem_field.
template <class Device, class Visit>
constexpr void for_each_device_field(Device& device, const Visit& visit) {
    auto& [major, minor, multiprocessors, shared_per_multiprocessor, shared_per_block, clock, bandwidth, geforce, code,
           maps] = device;
    visit_fields(visit, "compute_major", major, "compute_minor", minor, "multiprocessors", multiprocessors,
                 "shared_per_multiprocessor", shared_per_multiprocessor, "shared_per_block", shared_per_block, "clock_ghz",
                 clock, "bandwidth_gbs", bandwidth, "is_geforce", geforce, "has_hopper_code", code, "has_tensor_maps", maps);
}

// What all GPUs of one compute capability share.
struct Architecture {
    int compute_major, compute_minor;
    int threads_per_multiprocessor;
    // Multiply-adds per clock and multiprocessor: of mma.sync on 16-bit operands with float32 sums, and of the CUDA cores.
    double mma_per_clock, fma_per_clock;
};

// Threads from the CUDA programming guide's table of compute capabilities, rates from NVIDIA's architecture whitepapers.
inline constexpr std::array<Architecture, 6> architectures{{
    {8, 0, 2048, 1024, 64},
    {8, 6, 1536, 512, 128},
    {8, 9, 1536, 512, 128},
    {9, 0, 2048, 1280, 128},   // five eighths of wgmma's rate
    {10, 0, 2048, 1024, 128},  // an assumption: the whitepaper gives tcgen05 only
    {12, 0, 1536, 512, 128},
}};

// The newest architecture that is not newer than the device.
constexpr const Architecture& architecture_of(const DeviceInfo& device) {
    const Architecture* found = &architectures[0];
    for (const Architecture& known : architectures) {
        const bool is_newer = known.compute_major > device.compute_major ||
                              (known.compute_major == device.compute_major && known.compute_minor > device.compute_minor);
        if (!is_newer) found = &known;
    }
    return *found;
}

// For 16-bit operands; tf32 runs at half the rate. GeForce cards halve the rate with float32 sums.
constexpr double mma_per_clock(const DeviceInfo& device) {
    return architecture_of(device).mma_per_clock / (device.is_geforce ? 2 : 1);
}

constexpr double fma_per_clock(const DeviceInfo& device) { return architecture_of(device).fma_per_clock; }

// Whether kernels may start while earlier ones on the stream still run (programmatic dependent launch). Only the code for
// sm_90a waits for these.
constexpr bool starts_early(const DeviceInfo& device) {
    return device.compute_major == 9 && device.compute_minor == 0 && device.has_hopper_code;
}

struct NamedDevice {
    std::string_view name;
    DeviceInfo info;
};

// Datasheet values; shared memory from the CUDA programming guide's table of compute capabilities.
inline constexpr std::array<NamedDevice, 6> named_devices{{
    {"A100", {8, 0, 108, 164 << 10, 163 << 10, 1.41, 1555}},
    {"L4", {8, 9, 58, 100 << 10, 99 << 10, 2.04, 300}},
    {"RTX 4090", {8, 9, 128, 100 << 10, 99 << 10, 2.52, 1008, true}},
    {"H100", {9, 0, 132, 228 << 10, 227 << 10, 1.98, 3350}},
    {"H200", {9, 0, 132, 228 << 10, 227 << 10, 1.98, 4800}},
    {"B200", {10, 0, 148, 228 << 10, 227 << 10, 1.97, 8000}},
}};

// The named device; "H100/16" is a MIG slice with 16 multiprocessors. Throws std::invalid_argument for an unknown name.
DeviceInfo find_device(std::string_view name);

}  // namespace fused_cna
