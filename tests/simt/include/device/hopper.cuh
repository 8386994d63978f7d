// Replaces csrc/device/hopper.cuh when the kernels are compiled for the simulator: features of compute capability 9.0.
// Kernels never pass the last arguments: by default these are the kernel's position, for reports.
#pragma once

#include <cstdint>
#include <cstring>

#include <simt/block.h>
#include <simt/cluster.h>
#include <simt/load_matrices.h>
#include <device/ptx.cuh>
#include <device/tensor_map.cuh>
#include <device/vector.cuh>

namespace fused_cna::device {

inline void named_barrier(int id, int threads, Where where = Where::current()) {
    simt::block().barriers.named(id).wait_for(threads, {"named_barrier", where});
}

template <int Registers>
void give_registers(Where where = Where::current()) {
    simt::block().warpgroups.give_registers(thread_x(), Registers, {"give_registers", where});
}
template <int Registers>
void take_registers(Where where = Where::current()) {
    simt::block().warpgroups.take_registers(thread_x(), Registers, {"take_registers", where});
}

struct PhaseBarrier {
    uint64_t state;
};

inline void init_barrier(PhaseBarrier& barrier, int arrivals, Where where = Where::current()) {
    simt::block().phases.init(shared_address(&barrier, where), arrivals, {"init_barrier", where});
}

inline void publish_barriers() {
    simt::block().phases.publish(thread_x());
    simt::block().proxy.fence(thread_x());
}

inline void arrive(PhaseBarrier& barrier, Where where = Where::current()) {
    simt::block().phases.arrive(shared_address(&barrier, where), 0, {"arrive", where});
}

inline void arrive_expecting(PhaseBarrier& barrier, int bytes, Where where = Where::current()) {
    simt::block().phases.arrive(shared_address(&barrier, where), bytes, {"arrive_expecting", where});
}

inline void wait(PhaseBarrier& barrier, int parity, Where where = Where::current()) {
    simt::block().phases.wait(shared_address(&barrier, where), parity, {"wait", where});
}

inline void fence_async_proxy() { simt::block().proxy.fence(thread_x()); }

// PTX ISA, "prefetch", .tensormap: changes nothing. The map must be readable, which AddressSanitizer checks.
inline void prefetch_map(const TensorMap& map) { prefetch(&map); }

inline void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y,
                      Where where = Where::current()) {
    simt::block().tensor_copies.load_tile(thread_x(), destination, map, shared_address(&barrier, where), {x, y},
                                          {"load_tile", where});
}
inline void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y, int z,
                      Where where = Where::current()) {
    simt::block().tensor_copies.load_tile(thread_x(), destination, map, shared_address(&barrier, where), {x, y, z},
                                          {"load_tile", where});
}
inline void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y, int z, int t,
                      Where where = Where::current()) {
    simt::block().tensor_copies.load_tile(thread_x(), destination, map, shared_address(&barrier, where), {x, y, z, t},
                                          {"load_tile", where});
}

// The instruction takes unsigned 16-bit offsets.
inline void load_im2col(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int c, int w, int h, int n,
                        int offset_w, int offset_h, Where where = Where::current()) {
    simt::block().tensor_copies.load_im2col(thread_x(), destination, map, shared_address(&barrier, where), c, w, h, n,
                                            static_cast<uint16_t>(offset_w), static_cast<uint16_t>(offset_h),
                                            {"load_im2col", where});
}

inline void store_tile(const TensorMap& map, uint32_t source, int x, int y, int z, Where where = Where::current()) {
    simt::block().tensor_copies.store_tile(thread_x(), map, source, {x, y, z}, {"store_tile", where});
}

inline void commit_stores() { simt::block().tensor_copies.commit_stores(thread_x()); }

template <int Pending>
void wait_stores_read() {
    static_assert(Pending >= 0);
    simt::block().tensor_copies.wait_stores_read(thread_x(), Pending);
}

// Shared memory by address; one access of sizeof(T) bytes.
template <class T>
T load_shared_as(uint32_t address, const simt::Site& site) {
    T value;
    std::memcpy(&value, simt::block().shared.at(address, sizeof(T), site), sizeof(T));
    return value;
}
template <class T>
void store_shared_as(uint32_t address, const T& value, const simt::Site& site) {
    std::byte* place = simt::block().shared.at(address, sizeof(T), site);
    std::memcpy(place, &value, sizeof(T));
    simt::block().proxy.wrote(thread_x(), place, sizeof(T));
}

inline Vector16 load_shared(uint32_t address, Where where = Where::current()) {
    return load_shared_as<Vector16>(address, {"load_shared", where});
}
inline void store_shared(uint32_t address, const Vector16& v, Where where = Where::current()) {
    store_shared_as(address, v, {"store_shared", where});
}
inline void load_shared(uint32_t address, uint32_t (&words)[2], Where where = Where::current()) {
    const uint64_t both = load_shared_as<uint64_t>(address, {"load_shared", where});
    std::memcpy(words, &both, sizeof(both));
}
inline void store_shared(uint32_t address, const uint32_t (&words)[2], Where where = Where::current()) {
    store_shared_as(address, words, {"store_shared", where});
}

inline void store_matrices(uint32_t row_address, const uint32_t (&words)[4], Where where = Where::current()) {
    const simt::Site site{"store_matrices", where};
    simt::StoreMatricesSlot mine{row_address, words, thread_x()};
    simt::collective(simt::block().warp(), site, mine, [&](simt::Lanes<simt::StoreMatricesSlot> lanes) {
        simt::store_matrices(lanes, simt::block().shared, simt::block().proxy, site);
    });
}

inline int warpgroup() { return simt::block().thread() / 128; }

// Never called: is_hopper is true here.
inline void stop() {}

inline int cluster_rank() { return simt::block().rank(); }

inline void sync_cluster(Where where = Where::current()) { simt::block().cluster().barrier.wait({"sync_cluster", where}); }
inline void await_cluster(Where where = Where::current()) { simt::block().cluster().barrier.wait({"await_cluster", where}); }

inline Vector16 load_cluster(uint32_t address, int rank, Where where = Where::current()) {
    Vector16 v;
    std::memcpy(&v, simt::block().cluster().at(rank, address, sizeof(v), {"load_cluster", where}), sizeof(v));
    return v;
}

}  // namespace fused_cna::device
