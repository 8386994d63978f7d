// cp.async: correct uses, and every wrong use (tests/test_simt_async_copy.py).
#include <device/launch.cuh>
#include <device/ptx.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace async_copies {

constexpr int threads = 64;

struct Storage {
    alignas(16) float stages[4][threads * 4];
};

using Kernel = void (*)(const float* input, float* output);

template <Kernel kernel>
const char* run(const Buffers& b) {
    return launch<kernel>({1, threads, sizeof(Storage)}, {}, b.input, b.output);
}

// Starts the copy of input[thread] to stage[thread].
__device__ void copy_one(float* stage, const float* input, bool valid = true) {
    copy_async<4>(shared_address(stage + thread_x()), input + thread_x(), valid);
}

// Each thread copies `Floats` neighbours. Rows of the output: the sum of its own before the wait, after the wait, and the
// sum of the next thread's after a barrier.
template <int Floats>
__global__ void copy(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    const auto sum = [&](int thread) {
        float total = 0;
        for (int i = 0; i < Floats; ++i) total += stage[thread * Floats + i];
        return total;
    };
    const int first = thread_x() * Floats;
    copy_async<4 * Floats>(shared_address(stage + first), input + first, true);
    commit_copies();
    output[thread_x()] = sum(thread_x());
    wait_copies<0>();
    output[threads + thread_x()] = sum(thread_x());
    sync_threads();
    output[2 * threads + thread_x()] = sum((thread_x() + 1) % threads);
}
const TestKernel use_copy_4("copy_4", run<copy<1>>);
const TestKernel use_copy_8("copy_8", run<copy<2>>);
const TestKernel use_copy_16("copy_16", run<copy<4>>);

// Three groups and an uncommitted copy. Output: which of the four have landed after each of several waits.
__global__ void groups(const float* input, float* output) {
    auto& stages = shared_storage<Storage>().stages;
    int row = 0;
    const auto note = [&] {
        for (auto& stage : stages) output[row++ * threads + thread_x()] = !std::isnan(stage[thread_x()]);
    };
    for (int i = 0; i < 4; ++i) {
        copy_one(stages[i], input);
        if (i < 3) commit_copies();
    }
    wait_copies<3>();
    note();
    wait_copies<2>();
    note();
    wait_copies<1>();
    note();
    wait_copies<0>();
    note();
    commit_copies();  // the fourth copy
    commit_copies();  // an empty group counts too
    wait_copies<1>();
    note();
}
const TestKernel use_groups("copy_groups", run<groups>);

// The source changes while the copy is in flight.
__global__ void late_source(const float*, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    output[thread_x()] = 1;
    copy_one(stage, output);
    commit_copies();
    output[thread_x()] = 2;
    wait_copies<0>();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_late_source("late_source", run<late_source>);

// Odd threads copy zeros, from a null source.
__global__ void zero_fill(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    const bool valid = thread_x() % 2 == 0;
    copy_async<4>(shared_address(stage + thread_x()), valid ? input + thread_x() : nullptr, valid);
    commit_copies();
    wait_copies<0>();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_zero_fill("zero_fill", run<zero_fill>);

__global__ void never_waited(const float* input, float* output) {
    copy_one(shared_storage<Storage>().stages[0], input);
    commit_copies();
    output[thread_x()] = 1;
}
const TestKernel use_never_waited("never_waited", run<never_waited>);

__global__ void missing_wait(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    stage[thread_x()] = -5;  // left by an earlier round
    copy_one(stage, input);
    commit_copies();
    sync_threads();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_missing_wait("missing_wait", run<missing_wait>);

__global__ void too_many_pending(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    commit_copies();
    wait_copies<1>();
    sync_threads();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_too_many_pending("too_many_pending", run<too_many_pending>);

__global__ void missing_commit(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    wait_copies<0>();
    sync_threads();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_missing_commit("missing_commit", run<missing_commit>);

// Only the first warp waits, as if its wait covered the whole block's copies.
__global__ void wait_of_another_thread(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    commit_copies();
    if (warp() == 0) wait_copies<0>();
    sync_threads();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_wait_of_another_thread("wait_of_another_thread", run<wait_of_another_thread>);

__global__ void missing_barrier_after_wait(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    commit_copies();
    wait_copies<0>();
    output[thread_x()] = stage[(thread_x() + 1) % threads];
}
const TestKernel use_missing_barrier_after_wait("missing_barrier_after_wait", run<missing_barrier_after_wait>);

// The next round's copy into the stage starts before other threads have read this round's.
__global__ void stage_reused_early(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    float sum = 0;
    copy_one(stage, input);
    commit_copies();
    for (int round = 0; round < 3; ++round) {
        wait_copies<0>();
        sync_threads();
        copy_one(stage, input);
        commit_copies();
        sum += stage[(thread_x() + 1) % threads];
    }
    output[thread_x()] = sum;
}
const TestKernel use_stage_reused_early("stage_reused_early", run<stage_reused_early>);

// There are 63 values; the kernel takes the 64th as valid.
__global__ void one_valid_too_many(const float* input, float* output) {
    float* stage = shared_storage<Storage>().stages[0];
    constexpr int count = 63;
    copy_one(stage, input, thread_x() <= count);
    commit_copies();
    wait_copies<0>();
    output[thread_x()] = stage[thread_x()];
}
const TestKernel use_one_valid_too_many("one_valid_too_many", run<one_valid_too_many>);

__global__ void misaligned_destination(const float* input, float*) {
    copy_async<8>(shared_address(shared_storage<Storage>().stages[0] + 1), input, true);
}
const TestKernel use_misaligned_destination("misaligned_destination", run<misaligned_destination>);

__global__ void misaligned_source(const float* input, float*) {
    const float* aligned = reinterpret_cast<const float*>((reinterpret_cast<uintptr_t>(input) + 15) & ~uintptr_t{15});
    copy_async<16>(shared_address(shared_storage<Storage>().stages[0]), aligned + 2, true);
}
const TestKernel use_misaligned_source("misaligned_source", run<misaligned_source>);

__global__ void destination_outside(const float* input, float*) {
    copy_async<4>(shared_address(shared_storage<Storage>().stages[0]) + sizeof(Storage), input, true);
}
const TestKernel use_destination_outside("destination_outside", run<destination_outside>);

__global__ void not_shared(const float* input, float* output) { copy_async<4>(shared_address(output), input, true); }
const TestKernel use_not_shared("not_shared", run<not_shared>);

__global__ void written_under_way(const float* input, float*) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    commit_copies();
    stage[thread_x()] = 1;
    wait_copies<0>();
}
const TestKernel use_written_under_way("written_under_way", run<written_under_way>);

// An epilogue that reuses the destination of a copy that nobody waited for.
__global__ void written_before_the_end(const float* input, float*) {
    float* stage = shared_storage<Storage>().stages[0];
    copy_one(stage, input);
    commit_copies();
    sync_threads();
    stage[thread_x()] = 1;
}
const TestKernel use_written_before_the_end("written_before_the_end", run<written_before_the_end>);

}  // namespace async_copies

}  // namespace simt_tests
