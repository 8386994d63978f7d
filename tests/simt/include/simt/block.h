#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include <simt/async_copy.h>
#include <simt/barrier.h>
#include <simt/collective.h>
#include <simt/scheduler.h>
#include <simt/shared_memory.h>
#include <simt/warp.h>

namespace simt {

// Limits of a launch (CUDA C++ Programming Guide, "Compute Capabilities": maximum x-dimension of a grid of thread blocks,
// maximum number of threads per block).
inline constexpr int64_t max_blocks = 0x7FFFFFFF;
inline constexpr int max_threads = 1024;

// The block that is running: there is one at a time.
class Block {
   public:
    Block();

    int64_t index() const { return index_; }
    int64_t grid() const { return grid_; }
    int thread() const { return scheduler.current().index; }
    LaneGroup& warp() { return warps_[thread() / warp_lanes]; }

    void run(int64_t index, int64_t grid, int threads, int64_t shared_bytes, uint64_t seed,
             const std::function<void()>& kernel);

    Scheduler scheduler;
    Barriers barriers;
    SharedMemory shared;
    AsyncCopies copies;

   private:
    static void run_thread();
    static void thread_exited();

    int64_t index_ = 0;
    int64_t grid_ = 0;
    const std::function<void()>* kernel_ = nullptr;
    std::vector<LaneGroup> warps_;
};

extern Block block;

struct LaunchRequest {
    int64_t blocks;
    int threads;
    int64_t shared_bytes;
    const void* kernel_address;  // names the kernel in reports
};

// Runs `kernel` for every thread of every block, blocks in an order drawn from the seed. Returns what a launch returns:
// null, or the error in words for a shape that no device takes. Throws SimulatorError for what the kernel does wrong.
const char* launch(const LaunchRequest& request, const std::function<void()>& kernel);

// CUDA Runtime API, cudaFuncSetAttribute, cudaFuncAttributeMaxDynamicSharedMemorySize: the most that a launch of the kernel
// may ask for, by any thread, until it is set again; 48 KB where it never was.
const char* set_shared_limit(const void* kernel_address, int64_t bytes);

// Runs `event` when the next launch begins, as if on another thread it came just before.
void before_next_launch(std::function<void()> event);

// Chooses the order of everything in the launches that follow.
void set_seed(uint64_t seed);

}  // namespace simt
