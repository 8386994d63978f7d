// Replaces csrc/device/runtime.cuh when the kernels are compiled for the simulator.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>

#include <args.h>
#include <simt/block.h>
#include <device/types.cuh>

namespace fused_cna::device {

template <class T>
T& shared_storage() {
    static_assert(alignof(T) <= 1024, "dynamic shared memory is aligned to 1024 bytes");
    if (static_cast<int64_t>(sizeof(T)) > simt::block().shared.bytes())
        simt::fail("shared_storage of " + std::to_string(sizeof(T)) + " bytes, but the launch asked for " +
                   std::to_string(simt::block().shared.bytes()));
    return *reinterpret_cast<T*>(simt::block().shared.data());
}

struct LaunchShape {
    int64_t blocks;
    int threads;
    int64_t shared_bytes;
    int cluster = 1;  // blocks per cluster; divides `blocks`
};

// There is one device.
inline const char* find_current_device(int& device) {
    device = 0;
    return nullptr;
}

inline const char* find_shared_bytes(int, int& bytes) {
    bytes = simt::SharedMemory::limit_bytes;
    return nullptr;
}

template <class... P>
const char* set_shared_limit(void (*kernel)(P...), int bytes) {
    return simt::set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}

// Runs to the end before it returns. An early start only makes the earlier kernels look as if they had not ended.
template <class... P, class... A>
const char* start(void (*kernel)(P...), const LaunchShape& shape, Stream stream, const A&... args) {
    const std::tuple<std::remove_cv_t<P>...> parameters(args...);
    auto run_one_thread = [&] { std::apply(kernel, parameters); };
    return simt::launch({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster, stream.starts_early,
                         reinterpret_cast<const void*>(kernel)},
                        run_one_thread);
}

}  // namespace fused_cna::device
