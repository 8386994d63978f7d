#include "torch/device.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string_view>

#include "kernels/run.h"

namespace fused_cna {

namespace {

// setup.py defines it where sm_90a is among the architectures.
#ifdef FUSED_CNA_HAS_SM90A
constexpr bool has_hopper_code = true;
#else
constexpr bool has_hopper_code = false;
#endif

int device_attribute(cudaDeviceAttr attribute, c10::DeviceIndex device) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

DeviceInfo read_device_info(c10::DeviceIndex device) {
    const auto get = [&](cudaDeviceAttr attribute) { return device_attribute(attribute, device); };
    // Virtualised and integrated devices may report a clock of 0; any plausible clock ranks plans better than infinity does.
    const DeviceInfo& fallback = named_devices.front().info;
    const auto known = [](double reported, double otherwise) { return reported > 0 ? reported : otherwise; };
    const double memory_clock_hz = get(cudaDevAttrMemoryClockRate) * 1e3;  // two transfers per clock
    const DeviceInfo info{
        .compute_major = get(cudaDevAttrComputeCapabilityMajor),
        .compute_minor = get(cudaDevAttrComputeCapabilityMinor),
        .multiprocessors = get(cudaDevAttrMultiProcessorCount),
        .shared_per_multiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        .shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .clock_ghz = known(get(cudaDevAttrClockRate) * 1e-6, fallback.clock_ghz),
        .bandwidth_gbs =
            known(2 * memory_clock_hz * get(cudaDevAttrGlobalMemoryBusWidth) / 8 * 1e-9, fallback.bandwidth_gbs),
        .is_geforce =
            std::string_view(at::cuda::getDeviceProperties(device)->name).find("GeForce") != std::string_view::npos,
        .has_hopper_code = has_hopper_code,
        .has_tensor_maps = has_tensor_maps(),
    };
    TORCH_CHECK(info.compute_major >= 8, "fused_cna's kernels need compute capability 8.0 or newer, but device ",
                static_cast<int>(device), " has ", info.compute_major, ".", info.compute_minor,
                "; call fused_cna.conv_norm_act, which falls back");
    return info;
}

std::atomic<bool> early_starts_allowed = true;

}  // namespace

bool launches_start_early(const DeviceInfo& device) {
    return starts_early(device) && early_starts_allowed.load(std::memory_order_relaxed);
}

bool allow_early_starts(bool allowed) { return early_starts_allowed.exchange(allowed); }

const DeviceInfo& device_info(c10::DeviceIndex device) {
    static std::mutex mutex;
    static std::map<c10::DeviceIndex, DeviceInfo> infos;
    const std::lock_guard lock(mutex);
    const auto found = infos.find(device);
    return found != infos.end() ? found->second : infos.emplace(device, read_device_info(device)).first->second;
}

}  // namespace fused_cna
