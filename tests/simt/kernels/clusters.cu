// Clusters: correct uses, and every wrong use (tests/test_simt_clusters.py).
#include <device/hopper.cuh>
#include <device/launch.cuh>

#include <bit>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace clusters {

constexpr int threads = 64;

struct Storage {
    Vector16 values[threads];
};

using Kernel = void (*)(float* output, int cluster);

// Input: the number of blocks, and the blocks per cluster.
template <Kernel kernel>
const char* run(const Buffers& b) {
    const int blocks = static_cast<int>(b.input[0]), cluster = static_cast<int>(b.input[1]);
    return launch<kernel>({blocks, threads, sizeof(Storage), cluster}, {}, b.output, cluster);
}

__device__ void write_own() {
    const uint32_t value = std::bit_cast<uint32_t>(static_cast<float>(block_x() * threads + thread_x()));
    store_shared(shared_address(&shared_storage<Storage>().values[thread_x()]), Vector16{{value, value, value, value}});
}

__device__ float read_of(int rank, int thread) {
    return std::bit_cast<float>(load_cluster(shared_address(&shared_storage<Storage>().values[thread]), rank).words[3]);
}

// Each thread reads what its neighbour wrote in the next block of the cluster. Output per thread: that value, and its rank.
template <bool Before, bool Behind>
__global__ void exchange(float* output, int cluster) {
    write_own();
    if (Before) sync_cluster();
    float* mine = output + (block_x() * threads + thread_x()) * 2;
    mine[0] = read_of((cluster_rank() + 1) % cluster, (thread_x() + 1) % threads);
    mine[1] = static_cast<float>(cluster_rank());
    if (Behind) sync_cluster();
}
const TestKernel use_exchange("exchange", run<exchange<true, true>>);
const TestKernel use_read_too_early("read_too_early", run<exchange<false, true>>);
const TestKernel use_ended_too_early("ended_too_early", run<exchange<true, false>>);

// Threads that have exited are not waited for, in whichever block they are.
__global__ void some_exit(float* output, int) {
    if (cluster_rank() == 0 || thread_x() % 2 == 0) return;
    for (int i = 0; i < 3; ++i) sync_cluster();
    output[block_x() * threads + thread_x()] = 1;
}
const TestKernel use_some_exit("some_exit_of_a_cluster", run<some_exit>);

__global__ void rank_outside(float*, int cluster) { read_of(cluster, 0); }
const TestKernel use_rank_outside("rank_outside", run<rank_outside>);

// One thread waits at its block's barrier while the others wait for the cluster.
__global__ void divergent(float*, int) {
    if (cluster_rank() == 1 && thread_x() == 0) {
        named_barrier(1, 32);
    } else {
        sync_cluster();
    }
}
const TestKernel use_divergent("divergent_cluster", run<divergent>);

__global__ void too_few(float*, int) {
    if (thread_x() == 0) sync_threads();
    sync_cluster();
}
const TestKernel use_too_few("cluster_waits_for_all", run<too_few>);

}  // namespace clusters

}  // namespace simt_tests
