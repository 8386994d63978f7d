// What cannot be tested on a GPU: the hook for asynchronous units, with a copy that lands at a random time; the order of
// blocks; and the effect of another thread's launch on one that has begun.
#include <device/launch.cuh>
#include <device/ptx.cuh>

#include <thread>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

namespace {

struct Landing final : simt::Waitable {
    std::string status() const override { return "a copy that has not landed"; }
};

// Each thread starts one copy and thread 0 waits for its own. Output: what each thread sees before and after a barrier.
void late_copies(const float* input, float* output) {
    static const Landing landing;
    auto& copies = shared_storage<float[64]>();
    int me = thread_x();
    simt::block().scheduler.later([=, &copies] {
        copies[me] = input[me];
        if (me == 0) simt::block().scheduler.wake(0);
    });
    output[me] = copies[me];
    if (me == 0) simt::block().scheduler.park(landing, {"wait for a copy", std::source_location::current()});
    sync_threads();
    output[64 + me] = copies[me];
    output[128 + me] = copies[0];
}

const TestKernel use_late_copies("late_copies", [](const Buffers& b) {
    return launch<late_copies>({1, 64, sizeof(float[64])}, {}, b.input, b.output);
});

void block_order(float* output, int64_t* blocks_run) { output[block_x()] = static_cast<float>((*blocks_run)++); }

const TestKernel use_block_order("block_order", [](const Buffers& b) {
    int64_t blocks_run = 0;
    return launch<block_order>({b.outputs, 1, 0}, {}, b.output, &blocks_run);
});

__global__ void any_size(float* output) { ++output[0]; }

// Wrong, unlike csrc/device/launch.cuh: every launch sets the kernel's limit to its own size.
template <auto kernel, class... A>
const char* launch_with_exact_limit(const LaunchShape& shape, fused_cna::Stream stream, const A&... args) {
    if (const char* error = set_shared_limit(kernel, static_cast<int>(shape.shared_bytes))) return error;
    return start(kernel, shape, stream, args...);
}

// Between the larger launch's limit and its start, another thread makes the smaller launch. Then the larger one is launched
// again as by a captured graph, without setting a limit.
template <class Launch>
const char* launch_two_sizes(const Buffers& b, const Launch& launch_any_size) {
    const LaunchShape larger{1, 1, 200 * 1024}, smaller{1, 1, 60 * 1024};
    const char* error_beside = nullptr;
    simt::before_next_launch([&] { std::thread([&] { error_beside = launch_any_size(smaller); }).join(); });
    if (const char* error = launch_any_size(larger)) return error;
    if (error_beside) return error_beside;
    return start(any_size, larger, {}, b.output);
}

const TestKernel use_two_sizes("two_sizes", [](const Buffers& b) {
    return launch_two_sizes(b, [&](const LaunchShape& shape) { return launch<any_size>(shape, {}, b.output); });
});
const TestKernel use_exact_limits("two_sizes_with_exact_limits", [](const Buffers& b) {
    return launch_two_sizes(
        b, [&](const LaunchShape& shape) { return launch_with_exact_limit<any_size>(shape, {}, b.output); });
});

}  // namespace

}  // namespace simt_tests
