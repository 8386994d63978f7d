// Programmatic dependent launch: correct uses, and every wrong use (tests/test_simt_early_launch.py).
#include <simt/prerequisites.h>
#include <device/hopper.cuh>
#include <device/launch.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace early_launches {

constexpr int threads = 64, blocks = 2;
constexpr int columns = 32, rows = blocks * threads / columns;
constexpr int one = 37;  // index of a thread

struct Storage {
    alignas(1024) float tile[rows * columns];
    float values[threads];
    PhaseBarrier full;
};

struct Given {
    TensorMap map;  // of the input
    const float* input;
    float* output;
};

using Kernel = void (*)(const Given given);

template <Kernel kernel, int Cluster = 1, bool StartsEarly = true>
const char* run(const Buffers& b) {
    const int64_t input_bytes = b.inputs * sizeof(float), output_bytes = b.outputs * sizeof(float);
    // the residual may be the output's memory
    simt::set_memory({{"the output", b.output, output_bytes},
                      {"the input", const_cast<float*>(b.input), input_bytes},
                      {"the residual", b.output, output_bytes}});
    MapGeometry geometry{.address = b.input, .rank = 3, .swizzle_bytes = 128};
    geometry.sizes = {columns, rows, 1, 1};
    geometry.strides = {4, columns * 4, rows * columns * 4, 0};
    geometry.box = {columns, rows, 1, 1};
    Given given{{}, b.input, b.output};
    if (const char* refusal = encode_map(geometry, given.map)) return refusal;
    return launch<kernel>({blocks, threads, sizeof(Storage), Cluster}, {.starts_early = StartsEarly}, given);
}

__device__ int64_t place() { return block_x() * threads + thread_x(); }

// The task of every kernel.
__device__ void twice(const Given& given) { given.output[place()] = 2 * given.input[place()]; }

__device__ void copy(const Given& given, bool valid) {
    copy_async<4>(shared_address(shared_storage<Storage>().values + thread_x()), given.input + place(), valid);
    commit_copies();
}

// Does everything that is allowed before the wait.
__global__ void waits(const Given given) {
    launch_dependents();
    prefetch_map(given.map);
    prefetch(given.input + place());
    copy(given, false);
    wait_copies<0>();
    sync_threads();
    await_prerequisites();
    copy(given, true);
    wait_copies<0>();
    given.output[place()] = 2 * shared_storage<Storage>().values[thread_x()];
    await_prerequisites();
    launch_dependents();
}

__global__ void one_waits_for_all(const Given given) {
    if (thread_x() == one) await_prerequisites();
    sync_threads();
    twice(given);
}

__global__ void one_waits_for_the_cluster(const Given given) {
    if (cluster_rank() == 1 && thread_x() == one) await_prerequisites();
    sync_cluster();
    twice(given);
    await_prerequisites();
}

__global__ void one_more(const Given given) {
    await_prerequisites();
    given.output[place()] += 1;
}

template <bool IsForAll>
__global__ void read(const Given given) {
    const bool is_early = IsForAll || thread_x() == one;
    float value = 0;
    if (is_early) value = given.input[place()];
    await_prerequisites();
    if (!is_early) value = given.input[place()];
    given.output[place()] = 2 * value;
}

__global__ void write(const Given given) {
    if (thread_x() == one) given.output[place()] = 0;
    await_prerequisites();
    twice(given);
}

__global__ void one_does_not_wait(const Given given) {
    if (thread_x() != one) await_prerequisites();
    given.output[place()] = 1;
}

__global__ void start_copy(const Given given) {
    copy(given, true);
    await_prerequisites();
    wait_copies<0>();
    given.output[place()] = 2 * shared_storage<Storage>().values[thread_x()];
}

enum class Bulk { tile, im2col, store };
template <Bulk bulk>
__global__ void start_bulk_copy(const Given given) {
    Storage& shared = shared_storage<Storage>();
    const uint32_t tile = shared_address(shared.tile);
    if (thread_x() == 0) {
        init_barrier(shared.full, 1);
        publish_barriers();
        if (bulk == Bulk::tile) load_tile(tile, given.map, shared.full, 0, 0, 0);
        if (bulk == Bulk::im2col) load_im2col(tile, given.map, shared.full, 0, 0, 0, 0, 0, 0);
        if (bulk == Bulk::store) store_tile(given.map, tile, 0, 0, 0);
    }
    await_prerequisites();
}

__global__ void never_waits(const Given given) { twice(given); }

__global__ void a_block_never_waits(const Given given) {
    if (cluster_rank() == 0) await_prerequisites();
    sync_cluster();
    twice(given);
}

__global__ void deadlock(const Given) {
    if (thread_x() == one) named_barrier(1, threads);
    await_prerequisites();
}

// After a report the memory is as it was.
const char* run_after_a_report(const Buffers& b) {
    try {
        run<write>(b);
    } catch (const simt::SimulatorError&) {
        return run<never_waits, 1, false>(b);
    }
    return "no report";
}

const char* run_one_after_the_other(const Buffers& b) {
    if (const char* refused = run<waits>(b)) return refused;
    return run<one_more>(b);
}

const TestKernel of_table[] = {
    {"early_waits", run<waits>},
    {"early_waits_of_a_cluster", run<waits, 2>},
    {"early_one_waits_for_all", run<one_waits_for_all>},
    {"early_one_waits_for_the_cluster", run<one_waits_for_the_cluster, 2>},
    {"early_after_a_report", run_after_a_report},
    {"early_one_after_the_other", run_one_after_the_other},
    {"early_read", run<read<true>>},
    {"early_read_of_one", run<read<false>>},
    {"early_write", run<write>},
    {"early_one_does_not_wait", run<one_does_not_wait>},
    {"early_copy", run<start_copy>},
    {"early_load_tile", run<start_bulk_copy<Bulk::tile>>},
    {"early_load_im2col", run<start_bulk_copy<Bulk::im2col>>},
    {"early_store_tile", run<start_bulk_copy<Bulk::store>>},
    {"early_never_waits", run<never_waits>},
    {"early_block_never_waits", run<a_block_never_waits, 2>},
    {"early_deadlock", run<deadlock>},
    {"normal_waits", run<waits, 1, false>},
    {"normal_read", run<read<true>, 1, false>},
    {"normal_copy", run<start_copy, 1, false>},
    {"normal_write", run<write, 1, false>},
};

}  // namespace early_launches

}  // namespace simt_tests
