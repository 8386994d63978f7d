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

// What a block runs.
struct BlockWork {
    int64_t index;  // in the grid
    int64_t grid;
    int threads;
    int64_t shared_bytes;
    uint64_t seed;
    const std::function<void()>* kernel;  // is called by every thread
};

// One block with all that it has to itself. Those of a cluster run at the same time; one of them is at work at any moment.
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

    // To be called while it is running and can: one step, or as many as there are until it has ended or cannot.
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
    int cluster;                 // blocks of one
    bool starts_early;           // before the kernels ahead have ended
    const void* kernel_address;  // names the kernel in reports
};

// Runs `kernel` for every thread of every block, clusters in an order drawn from the seed. Returns what a launch returns:
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
