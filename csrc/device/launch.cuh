// The only way to launch a kernel. Portable.
#pragma once

#include <atomic>
#include <cstdint>

#include <device/runtime.cuh>

namespace fused_cna::device {

// A kernel that uses more than 48 KB of shared memory needs its limit on the device raised first. It is raised once, to the
// device's maximum, and never lowered: another thread may be about to launch the same kernel with more than this call needs,
// and a captured graph launches it again at any time.
template <auto kernel>
const char* raise_shared_limit() {
    static std::atomic<uint64_t> raised = 0;  // a bit for each of the first 64 devices
    int device = 0, bytes = 0;
    if (const char* error = find_current_device(device)) return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (raised & bit) return nullptr;
    if (const char* error = find_shared_bytes(device, bytes)) return error;
    if (const char* error = set_shared_limit(kernel, bytes)) return error;
    raised |= bit;
    return nullptr;
}

// Returns null, or the error message.
template <auto kernel, class... A>
const char* launch(const LaunchShape& shape, Stream stream, const A&... args) {
    if (stream.is_dry) return nullptr;
    constexpr int64_t shared_bytes_without_asking = 48 * 1024;
    if (shape.shared_bytes > shared_bytes_without_asking) {
        if (const char* error = raise_shared_limit<kernel>()) return error;
    }
    return start(kernel, shape, stream, args...);
}

}  // namespace fused_cna::device
