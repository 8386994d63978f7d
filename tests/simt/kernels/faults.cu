// Planted faults: each kernel breaks one rule, which the simulator must report (tests/test_simt.py).
#include <device/hopper.cuh>
#include <device/launch.cuh>
#include <device/ptx.cuh>

#include <stdexcept>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

// Not in an unnamed namespace, so that reports can name the kernels.
namespace faults {

using Kernel = void (*)(const float* input, float* output);

constexpr int threads = 64;

struct Storage {
    float first[threads];
    float second[threads];
};

template <Kernel kernel>
const char* run(const Buffers& b) {
    return launch<kernel>({1, threads, sizeof(Storage)}, {}, b.input, b.output);
}

// Reads the neighbour's value without waiting for it.
__global__ void missing_barrier(const float* input, float* output) {
    auto& shared = shared_storage<Storage>();
    shared.first[thread_x()] = input[thread_x()];
    output[thread_x()] = shared.first[(thread_x() + 1) % threads];
}
const TestKernel use_missing_barrier("missing_barrier", run<missing_barrier>);

// Overwrites the value for the next round while neighbours may still read it.
__global__ void missing_second_barrier(const float* input, float* output) {
    auto& shared = shared_storage<Storage>();
    float sum = 0;
    for (int i = 0; i < 3; ++i) {
        shared.first[thread_x()] = input[thread_x()] + static_cast<float>(i);
        sync_threads();
        sum += shared.first[(thread_x() + 1) % threads];
    }
    output[thread_x()] = sum;
}
const TestKernel use_missing_second_barrier("missing_second_barrier", run<missing_second_barrier>);

// Thread 5 exits although a counted barrier waits for it.
__global__ void exit_before_counted_barrier(const float*, float* output) {
    if (thread_x() == 5) return;
    named_barrier(3, threads);
    output[thread_x()] = 1;
}
const TestKernel use_exit_before_counted_barrier("exit_before_counted_barrier", run<exit_before_counted_barrier>);

// Thread 37 waits elsewhere forever.
__global__ void skipped_barrier(const float*, float* output) {
    if (thread_x() == 37) {
        named_barrier(2, 32);
    } else {
        sync_threads();
    }
    output[thread_x()] = 1;
}
const TestKernel use_skipped_barrier("skipped_barrier", run<skipped_barrier>);

// Thread 37 skips the first of two barriers; the hardware would pair its second with the others' first.
__global__ void divergent_barrier(const float*, float* output) {
    if (thread_x() != 37) sync_threads();
    output[thread_x()] = 1;
    sync_threads();
}
const TestKernel use_divergent_barrier("divergent_barrier", run<divergent_barrier>);

__global__ void differing_counts(const float*, float* output) {
    named_barrier(1, warp() == 0 ? 64 : 32);
    output[thread_x()] = 1;
}
const TestKernel use_differing_counts("differing_counts", run<differing_counts>);

// Both warps use a barrier that counts only one of them.
__global__ void count_too_small(const float*, float* output) {
    named_barrier(1, 32);
    output[thread_x()] = 1;
}
const TestKernel use_count_too_small("count_too_small", run<count_too_small>);

// Only the first warp reaches a barrier that counts both.
__global__ void count_too_large(const float*, float* output) {
    if (warp() == 0) named_barrier(1, 64);
    output[thread_x()] = 1;
}
const TestKernel use_count_too_large("count_too_large", run<count_too_large>);

__global__ void odd_count(const float*, float*) { named_barrier(1, 48); }
const TestKernel use_odd_count("odd_count", run<odd_count>);

__global__ void no_such_barrier(const float*, float*) { named_barrier(16, threads); }
const TestKernel use_no_such_barrier("no_such_barrier", run<no_such_barrier>);

__global__ void divergent_collective(const float* input, float* output) {
    if (thread_x() % 32 == 7) {
        output[thread_x()] = static_cast<float>(ballot(true));
    } else {
        output[thread_x()] = shuffle_xor(input[thread_x()], 1);
    }
}
const TestKernel use_divergent_collective("divergent_collective", run<divergent_collective>);

__global__ void differing_types(const float* input, float* output) {
    output[thread_x()] = lane() < 16 ? shuffle_xor(input[thread_x()], 1) : static_cast<float>(shuffle_xor(thread_x(), 1));
}
const TestKernel use_differing_types("differing_types", run<differing_types>);

__global__ void exited_lane(const float* input, float* output) {
    if (thread_x() == 45) return;
    output[thread_x()] = shuffle_down(input[thread_x()], 1);
}
const TestKernel use_exited_lane("exited_lane", run<exited_lane>);

__global__ void collective_against_barrier(const float* input, float* output) {
    if (lane() < 16) sync_threads();
    output[thread_x()] = shuffle_xor(input[thread_x()], 1);
    if (lane() >= 16) sync_threads();
}
const TestKernel use_collective_against_barrier("collective_against_barrier", run<collective_against_barrier>);

__global__ void half_a_warp(const float* input, float* output) { output[0] = shuffle(input[0], 0); }
const TestKernel use_half_a_warp("half_a_warp",
                                 [](const Buffers& b) { return launch<half_a_warp>({1, 48, 0}, {}, b.input, b.output); });

__global__ void read_past_input(const float* input, float* output) { output[thread_x()] = input[thread_x() + 1]; }
const TestKernel use_read_past_input("read_past_input", run<read_past_input>);

__global__ void write_past_output(const float* input, float* output) { output[thread_x() + 1] = input[thread_x()]; }
const TestKernel use_write_past_output("write_past_output", run<write_past_output>);

__global__ void write_past_shared(const float* input, float* output) {
    float* words = shared_storage<Storage>().first;
    words[2 * thread_x() + 2] = input[thread_x()];
    output[thread_x()] = 1;
}
const TestKernel use_write_past_shared("write_past_shared", run<write_past_shared>);

__global__ void read_past_shared(const float*, float* output) {
    float* words = shared_storage<Storage>().first;
    output[thread_x()] = words[2 * thread_x() + 2];
}
const TestKernel use_read_past_shared("read_past_shared", run<read_past_shared>);

// From one array of a struct into the next: inside the block's memory, so only the type shows it.
__global__ void overrun_inside_struct(const float* input, float* output) {
    auto& shared = shared_storage<Storage>();
    int behind_first = thread_x() + 1;
    shared.first[behind_first] = input[thread_x()];
    output[thread_x()] = 1;
}
const TestKernel use_overrun_inside_struct("overrun_inside_struct", run<overrun_inside_struct>);

__global__ void misaligned_access(const float* input, float* output) {
    struct alignas(16) Vector {
        float values[4];
    };
    output[thread_x()] = reinterpret_cast<const Vector*>(input + 1)->values[0];
}
const TestKernel use_misaligned_access("misaligned_access", run<misaligned_access>);

// The volatile frame and the work after the call keep the recursion from becoming a loop.
int descend(int depth) {
    volatile char frame[4096];
    frame[0] = 1;
    return depth > 0 ? descend(depth - 1) + frame[0] : 0;
}

__global__ void stack_overflow(const float*, float* output) { output[thread_x()] = static_cast<float>(descend(1 << 20)); }
const TestKernel use_stack_overflow("stack_overflow", run<stack_overflow>);

__global__ void uninitialised_shared(const float* input, float* output) {
    auto& shared = shared_storage<Storage>();
    if (thread_x() != 11) shared.first[thread_x()] = input[thread_x()];
    sync_threads();
    output[thread_x()] = 2 * shared.first[thread_x()];
}
const TestKernel use_uninitialised_shared("uninitialised_shared", run<uninitialised_shared>);

__global__ void too_little_shared(const float*, float* output) { output[0] = shared_storage<Storage>().first[0]; }
const TestKernel use_too_little_shared("too_little_shared", [](const Buffers& b) {
    return launch<too_little_shared>({1, threads, sizeof(Storage) - 4}, {}, b.input, b.output);
});

__global__ void exception(const float*, float*) {
    sync_threads();
    if (thread_x() == 20) throw std::runtime_error("thrown by thread 20");
    sync_threads();
}
const TestKernel use_exception("exception", run<exception>);

__global__ void unwritten_output(const float* input, float* output) {
    if (thread_x() != 9) output[thread_x()] = input[thread_x()];
}
const TestKernel use_unwritten_output("unwritten_output", run<unwritten_output>);

}  // namespace faults

}  // namespace simt_tests
