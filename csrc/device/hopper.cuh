// Hardware features of compute capability 9.0 alone ("a" targets), one per function. Addresses come from shared_address.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <device/ptx.cuh>
#include <device/tensor_map.cuh>
#include <device/vector.cuh>

namespace fused_cna::device {

// The index of this thread's warpgroup in the block. The shuffle tells the compiler that the whole warp has the same value.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, thread_x() / 128, 0); }

// Ends a kernel for 9.0 that was compiled for another target: a trap, rather than an output that nobody wrote.
__device__ __forceinline__ void stop() { __trap(); }

// bar.sync: waits until `threads` threads (whole warps) have reached the barrier; its id is from 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: lowers the registers of every thread of the warpgroup to this number, or raises them from what others gave up.
template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// mbarrier: a phase completes once it has all its arrivals and all bytes that arrivals said to expect; then the next begins.
// Lies in shared memory; one thread initialises it.
struct PhaseBarrier {
    uint64_t state;
};

__device__ __forceinline__ void init_barrier(PhaseBarrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to bulk copies and to the cluster; other threads also need sync_threads.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(PhaseBarrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(PhaseBarrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is complete. Parities are 0 for the first phase, then 1, 0, and so on. Parity 1
// counts as complete before the first phase has ended.
__device__ __forceinline__ void wait(PhaseBarrier& barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// fence.proxy.async: bulk copies and wgmma that start after it see what this thread wrote to shared memory.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor: one thread copies a box to shared memory; the barrier counts its bytes. Coordinates are those of the
// box's first element, dense dimension first.
__device__ __forceinline__ void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            destination),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y,
                                          int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(destination),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int x, int y,
                                          int z, int t) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(t)
        : "memory");
}

// The same through an im2col map: channels from c on, pixels from (w, h, n) on, each pixel moved by the offsets.
__device__ __forceinline__ void load_im2col(uint32_t destination, const TensorMap& map, PhaseBarrier& barrier, int c, int w,
                                            int h, int n, int offset_w, int offset_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
        "h"(static_cast<uint16_t>(offset_h))
        : "memory");
}

// One thread writes a box from shared memory, except what lies outside the tensor.
__device__ __forceinline__ void store_tile(const TensorMap& map, uint32_t source, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Closes the group of this thread's stores since the last commit.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but this thread's latest Pending groups have read their shared memory, which may then be overwritten.
template <int Pending>
__device__ __forceinline__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Shared memory by address, in the generic proxy.
__device__ __forceinline__ Vector16 load_shared(uint32_t address) {
    Vector16 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, const Vector16& v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.words[0]), "r"(v.words[1]),
                 "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t (&words)[2]) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[2]) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1]) : "memory");
}

// stmatrix.x4: the inverse of load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t row_address, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// A cluster: neighbouring blocks that run at the same time and can read each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// Waits for every thread of the cluster that has not exited. Each then sees what all wrote before it.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The same without visibility of writes: no block exits, and frees its shared memory, before all have arrived.
__device__ __forceinline__ void await_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    asm volatile("barrier.cluster.wait;" ::: "memory");
}

// Reads 16 bytes of another block's shared memory; `address` is the same place in this block's.
__device__ __forceinline__ Vector16 load_cluster(uint32_t address, int rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    Vector16 v;
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "r"(remote)
                 : "memory");
    return v;
}

}  // namespace fused_cna::device
