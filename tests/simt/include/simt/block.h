// One block with everything that belongs to it, and launching a grid of them.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include <simt/async_copy.h>
#include <simt/async_proxy.h>
#include <simt/barrier.h>
#include <simt/collective.h>
#include <simt/phase_barrier.h>
#include <simt/scheduler.h>
#include <simt/shared_memory.h>
#include <simt/tensor_copies.h>
#include <simt/warp.h>
#include <simt/warpgroup.h>

namespace simt {

// Limits of a launch (CUDA C++ Programming Guide, "Compute Capabilities": maximum x-dimension of a grid of thread blocks,
// maximum number of threads per block).
inline constexpr int64_t max_blocks = 0x7FFFFFFF;
inline constexpr int max_threads = 1024;

// CUDA C++ Programming Guide, "Thread Block Clusters": eight blocks are supported as a portable cluster size.
inline constexpr int max_cluster = 8;

class Cluster;

// The work of a block.
struct BlockWork {
    int64_t index;  // in the grid
    int64_t grid;
    int threads;
    int64_t shared_bytes;
    Garbage garbage;
    uint64_t seed;
    const std::function<void()>* kernel;  // called by every thread
};

// One block and all its state. The blocks of a cluster run at the same time, interleaved on one host thread.
class Block {
   public:
    Block(Cluster& cluster, int rank);

    int64_t index() const { return work_.index; }
    int64_t grid() const { return work_.grid; }
    int thread() const { return scheduler.current().index; }
    LaneGroup& warp() { return warps_[thread() / warp_lanes]; }
    Warpgroup& warpgroup() { return warpgroups[thread()]; }
    Cluster& cluster() const { return cluster_; }
    int rank() const { return rank_; }

    void start(const BlockWork& work);
    bool is_running() const { return scheduler.live() > 0; }
    bool can_step() const { return scheduler.can_step(); }

    // Only while it is running and can_step(): one step, or steps until it has ended or cannot go on.
    void step();
    void run();

    Scheduler scheduler;
    Barriers barriers;
    SharedMemory shared;
    AsyncProxy proxy;
    AsyncCopies copies;
    PhaseBarriers phases;
    Warpgroups warpgroups;
    TensorCopies tensor_copies;

   private:
    static void run_thread();
    static void thread_exited();
    void finish_if_ended();

    Cluster& cluster_;
    int rank_;
    BlockWork work_{};
    std::vector<LaneGroup> warps_;
};

namespace detail { inline Block* block_at_work = nullptr; }  // namespace detail

// The block whose thread is running.
inline Block& block() { return *detail::block_at_work; }

struct LaunchRequest {
    int64_t blocks;
    int threads;
    int64_t shared_bytes;
    int cluster;                 // blocks per cluster
    bool starts_early;           // before the earlier kernels have ended
    const void* kernel_address;  // names the kernel in reports
};

// Runs `kernel` for every thread of every block, clusters in an order drawn from the seed. Returns null, or a launch error's
// message for a shape that no device takes. Throws SimulatorError for a fault of the kernel.
const char* launch(const LaunchRequest& request, const std::function<void()>& kernel);

// CUDA Runtime API, cudaFuncSetAttribute, cudaFuncAttributeMaxDynamicSharedMemorySize: the most that a launch of the kernel
// may request, on any thread, until it is set again; 48 KB by default.
const char* set_shared_limit(const void* kernel_address, int64_t bytes);

// Runs `event` at the start of the next launch, as if another thread did it just before.
void before_next_launch(std::function<void()> event);

// Determines the order of everything in the following launches.
void set_seed(uint64_t seed);

}  // namespace simt
