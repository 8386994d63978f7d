// What only the simulator can show: the hook for asynchronous units of the hardware, tried with a copy that lands
// whenever it likes, and the order in which blocks run.
#include <device/launch.cuh>
#include <device/ptx.cuh>

#include "test_kernel.h"

namespace simt_tests {

using namespace fused_cna::device;

namespace {

struct Landing final : simt::Waitable {
    std::string status() const override { return "a copy that has not landed"; }
};

// Each thread starts one copy; thread 0 waits for its own, and everybody notes what it sees before and after a barrier.
void late_copies(const float* input, float* output) {
    static const Landing landing;
    auto& copies = shared_storage<float[64]>();
    int me = thread_x();
    simt::block.scheduler.later([=, &copies] {
        copies[me] = input[me];
        if (me == 0) simt::block.scheduler.wake(0);
    });
    output[me] = copies[me];
    if (me == 0) simt::block.scheduler.park(landing, {"wait for a copy", std::source_location::current()});
    sync_threads();
    output[64 + me] = copies[me];
    output[128 + me] = copies[0];
}

const TestKernel use_late_copies("late_copies", [](const Buffers& b) {
    return launch(late_copies, {1, 64, sizeof(float[64])}, nullptr, b.input, b.output);
});

void block_order(float* output, int64_t* blocks_run) { output[block_x()] = static_cast<float>((*blocks_run)++); }

const TestKernel use_block_order("block_order", [](const Buffers& b) {
    int64_t blocks_run = 0;
    return launch(block_order, {b.outputs, 1, 0}, nullptr, b.output, &blocks_run);
});

}  // namespace

}  // namespace simt_tests
