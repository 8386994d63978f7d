#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <simt/block.h>
#include <simt/prerequisites.h>
#include <simt/random.h>
#include <simt/report.h>

namespace simt {

// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster": arrive, then wait.
class ClusterBarrier final : public Waitable {
   public:
    explicit ClusterBarrier(const Cluster& cluster) : cluster_(cluster) {}

    // Waits for all non-exited threads of the cluster.
    void wait(const Site& site);

    void thread_exited();
    void reset() { arrived_.clear(); }
    std::string status() const override;

   private:
    void release(const Block* running);

    const Cluster& cluster_;
    Site site_{};                                  // where the first to arrive stands
    std::vector<std::pair<Block*, int>> arrived_;  // and the thread
};

// Neighbouring blocks that run at the same time; where a launch asks for none, each block is one.
class Cluster {
   public:
    Cluster() : barrier(*this), prerequisites(*this) {}

    // Runs the blocks from `first` on to their end, interleaved in an order drawn from `random`. Throws SimulatorError when
    // none can go on.
    void run(int64_t first, const LaunchRequest& request, Random& random, const std::function<void()>& kernel);

    int size() const { return size_; }
    Block& block(int rank) const { return *blocks_[rank]; }
    int live_threads() const;

    // What the threads of every block wait for and where they stand.
    std::string standing() const;

    // PTX ISA, "Data Movement and Conversion Instructions: mapa": what lies in the shared memory of a block of the cluster
    // where `address` lies in one's own. Reported: a block that is not there, or has ended.
    const std::byte* at(int rank, uint32_t address, int bytes, const Site& site) const;

    ClusterBarrier barrier;
    Prerequisites prerequisites;

   private:
    // Runs the blocks as far as they can.
    void advance(Random& random);
    void interleave(Random random);

    int size_ = 0;
    std::vector<std::unique_ptr<Block>> blocks_;  // by rank; more than `size_` where an earlier launch had more
};

}  // namespace simt
