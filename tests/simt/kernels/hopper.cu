// mbarrier, stmatrix, accesses by address, setmaxnreg and clusters: correct uses, and every wrong use
// (tests/test_simt_hopper.py).
#include <device/hopper.cuh>
#include <device/launch.cuh>

#include <bit>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace hopper {

constexpr int threads = 64, row_bytes = 16;

struct Storage {
    alignas(16) float stage[threads * 4];
    PhaseBarrier full, empty;
};

using Kernel = void (*)(const float* input, float* output);

template <Kernel kernel, int Threads = threads, int Cluster = 1>
const char* run(const Buffers& b) {
    return launch<kernel>({Cluster, Threads, sizeof(Storage), Cluster}, {}, b.input, b.output);
}

// Both barriers expect `arrivals` arrivals.
__device__ Storage& make_barriers(int arrivals, bool publish = true) {
    Storage& shared = shared_storage<Storage>();
    if (thread_x() == 0) {
        init_barrier(shared.full, arrivals);
        init_barrier(shared.empty, arrivals);
        if (publish) publish_barriers();
    }
    sync_threads();
    return shared;
}

// In each round all threads write, then read a neighbour's value: the stage is full and empty in turn. Output: a row per
// round.
template <int Start>
__global__ void rounds(const float* input, float* output) {
    Storage& shared = make_barriers(threads);
    for (int round = 0; round < 5; ++round) {
        wait(shared.empty, (round + 1) % 2);
        shared.stage[thread_x()] = input[thread_x()] + static_cast<float>(round);
        arrive(shared.full);
        wait(shared.full, (round + Start) % 2);
        output[round * threads + thread_x()] = shared.stage[(thread_x() + 17) % threads];
        arrive(shared.empty);
    }
}
const TestKernel use_rounds("phases", run<rounds<0>>);
const TestKernel use_wrong_parity("wrong_parity", run<rounds<1>>);

// Like load_tile: 16 bytes land at some later time, and the barrier counts them.
__device__ void bulk_copy(float* destination, const float* source, PhaseBarrier& barrier) {
    simt::Block& block = simt::block();
    auto* bytes = reinterpret_cast<std::byte*>(destination);
    const uint32_t address = shared_address(&barrier);
    block.proxy.poison(bytes, 16);
    block.scheduler.later([=, &block] {
        block.proxy.write(bytes, source, 16);
        block.phases.complete_bytes(address, 16, {"bulk_copy", std::source_location::current()});
    });
}

// Thread 0 copies 16 values, in four pieces, before it announces the number of bytes.
template <int Expected, int Parity = 0, bool Publish = true>
__global__ void bulk(const float* input, float* output) {
    Storage& shared = make_barriers(1, Publish);
    if (thread_x() == 0) {
        for (int i = 0; i < 16; i += 4) bulk_copy(shared.stage + i, input + i, shared.full);
    }
    sync_threads();
    if (thread_x() == 0) arrive_expecting(shared.full, Expected);
    wait(shared.full, Parity);
    output[thread_x()] = shared.stage[thread_x() % 16];
}
const TestKernel use_bulk("bulk", run<bulk<64>>);
const TestKernel use_too_many_bytes("too_many_bytes", run<bulk<80>>);
const TestKernel use_too_few_bytes("too_few_bytes", run<bulk<48>>);
const TestKernel use_wrong_parity_of_bulk("wrong_parity_of_bulk", run<bulk<64, 1>>);
const TestKernel use_missing_publish("missing_publish", run<bulk<64, 0, false>>);

template <int Arrivals>
__global__ void few_arrivals(const float*, float*) {
    Storage& shared = make_barriers(Arrivals);
    arrive(shared.full);
    wait(shared.full, 0);
}
const TestKernel use_too_few_arrivals("too_few_arrivals", run<few_arrivals<threads + 2>>);

__global__ void too_many_arrivals(const float*, float*) {
    Storage& shared = make_barriers(1);
    if (thread_x() != 0) return;
    arrive_expecting(shared.full, 16);
    arrive(shared.full);
}
const TestKernel use_too_many_arrivals("too_many_arrivals", run<too_many_arrivals>);

// One thread completes two phases while another waits for the first.
__global__ void missed_phase(const float*, float*) {
    Storage& shared = make_barriers(1);
    if (thread_x() == 0) {
        arrive(shared.full);
        arrive(shared.full);
    } else {
        wait(shared.full, 0);
    }
}
const TestKernel use_missed_phase("missed_phase", run<missed_phase>);

__global__ void no_arrivals(const float*, float*) { make_barriers(0); }
const TestKernel use_no_arrivals("no_arrivals", run<no_arrivals>);

__global__ void made_twice(const float*, float*) {
    make_barriers(1);
    make_barriers(1);
}
const TestKernel use_made_twice("made_twice", run<made_twice>);

__global__ void never_made(const float*, float*) { arrive(shared_storage<Storage>().full); }
const TestKernel use_never_made("never_made", run<never_made>);

__global__ void overwritten_barrier(const float*, float*) {
    Storage& shared = make_barriers(threads);
    if (thread_x() == 0) shared.full.state = 0;
    sync_threads();
    arrive(shared.full);
}
const TestKernel use_overwritten_barrier("overwritten_barrier", run<overwritten_barrier>);

__global__ void million_bytes(const float*, float*) {
    Storage& shared = make_barriers(threads);
    arrive_expecting(shared.full, 1 << 17);
}
const TestKernel use_million_bytes("million_bytes", run<million_bytes>);

// Lane l stores to the 16 bytes that the input says; its words are 4 l, 4 l + 1, ... Output: shared memory, then what the
// lanes read back.
__global__ void store(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stage;
    uint32_t words[4], read[4];
    for (int i = 0; i < 4; ++i) words[i] = std::bit_cast<uint32_t>(static_cast<float>(4 * lane() + i));
    const uint32_t row = shared_address(stage) + static_cast<uint32_t>(input[lane()]);
    store_matrices(row, words);
    load_matrices(row, read);
    for (int i = lane(); i < threads * 4; i += 32) output[i] = stage[i];
    for (int i = 0; i < 4; ++i) output[threads * 4 + lane() * 4 + i] = std::bit_cast<float>(read[i]);
}
const TestKernel use_store("store_matrices", run<store, 32>);

template <int Offset>
__global__ void store_at(const float*, float*) {
    const uint32_t words[4] = {};
    store_matrices(shared_address(shared_storage<Storage>().stage) + lane() * row_bytes + Offset, words);
}
const TestKernel use_misaligned_store("misaligned_store", run<store_at<4>, 32>);
const TestKernel use_store_outside("store_outside", run<store_at<-16>, 32>);

// Each thread moves 16 bytes of the input to shared memory, then 8 bytes to its neighbour's place.
__global__ void by_address(const float* input, float* output) {
    const uint32_t stage = shared_address(shared_storage<Storage>().stage);
    Vector16 v;
    memcpy(&v, input + thread_x() * 4, sizeof(v));
    store_shared(stage + thread_x() * 16, v);
    sync_threads();
    uint32_t pair[2];
    load_shared(stage + (thread_x() + 1) % threads * 16 + 8, pair);
    sync_threads();
    store_shared(stage + thread_x() * 16, pair);
    v = load_shared(stage + thread_x() * 16);
    memcpy(output + thread_x() * 4, &v, sizeof(v));
}
const TestKernel use_by_address("by_address", run<by_address>);

// What the async proxy sees of a thread's cp.async. The copy lands at its wait, so the fence must come after.
template <bool Behind>
__global__ void copied_and_fenced(const float* input, float* output) {
    float* mine = shared_storage<Storage>().stage + thread_x() * 4;
    copy_async<16>(shared_address(mine), input + thread_x() * 4, true);
    commit_copies();
    if (!Behind) fence_async_proxy();
    wait_copies<0>();
    if (Behind) fence_async_proxy();
    memcpy(output + thread_x() * 4, simt::block().proxy.view(reinterpret_cast<const std::byte*>(mine)), 16);
}
const TestKernel use_copied_and_fenced("copied_and_fenced", run<copied_and_fenced<true>>);
const TestKernel use_fenced_too_early("fenced_too_early", run<copied_and_fenced<false>>);

template <int Offset>
__global__ void load_at(const float*, float*) {
    load_shared(shared_address(shared_storage<Storage>().stage) + Offset);
}
const TestKernel use_misaligned_load("misaligned_load", run<load_at<8>>);
const TestKernel use_load_outside("shared_load_outside", run<load_at<sizeof(Storage)>>);

// Three warpgroups: the first gives registers, the others take them.
template <int Given, int Taken>
__global__ void registers(const float*, float* output) {
    if (warp() < 4) {
        give_registers<Given>();
    } else {
        take_registers<Taken>();
    }
    output[thread_x()] = 1;
}
const TestKernel use_registers("registers", run<registers<24, 240>, 384>);
const TestKernel use_too_many_registers("too_many_registers", run<registers<40, 240>, 384>);
const TestKernel use_odd_registers("odd_registers", run<registers<24, 236>, 384>);

__global__ void three_warps_give(const float*, float*) {
    if (warp() != 2) give_registers<24>();
}
const TestKernel use_three_warps_give("three_warps_give", run<three_warps_give, 128>);

__global__ void two_counts(const float*, float*) {
    if (warp() != 2) {
        give_registers<24>();
    } else {
        give_registers<32>();
    }
}
const TestKernel use_two_counts("two_counts", run<two_counts, 128>);

__global__ void give_to_more(const float*, float*) {
    give_registers<24>();
    give_registers<32>();
}
const TestKernel use_give_to_more("give_to_more", run<give_to_more, 128>);

}  // namespace hopper

}  // namespace simt_tests
