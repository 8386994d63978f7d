// The blocks of a cluster, which run together.
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
    Site site_{};                                  // the place of the first thread to arrive
    std::vector<std::pair<Block*, int>> arrived_;  // block and thread
};

// Neighbouring blocks that run at the same time; a launch without clusters has one block in each.
class Cluster {
   public:
    Cluster() : barrier(*this), prerequisites(*this) {}

    // Runs the blocks from `first` on to their end, interleaved in an order drawn from `random`. Throws SimulatorError when
    // none can go on.
    void run(int64_t first, const LaunchRequest& request, Garbage garbage, Random& random,
             const std::function<void()>& kernel);

    int size() const { return size_; }
    Block& block(int rank) const { return *blocks_[rank]; }
    int live_threads() const;

    // What the threads of every block wait for, and where they are.
    std::string standing() const;

    // PTX ISA, "Data Movement and Conversion Instructions: mapa": the memory of a block of the cluster that corresponds to
    // `address` in one's own block. Reported: a block that does not exist, or has ended.
    const std::byte* at(int rank, uint32_t address, int bytes, const Site& site) const;

    ClusterBarrier barrier;
    Prerequisites prerequisites;

   private:
    // Runs the blocks as far as they can.
    void advance(Random& random);
    void interleave(Random random);

    int size_ = 0;
    std::vector<std::unique_ptr<Block>> blocks_;  // by rank; more than `size_` after a launch with larger clusters
};

}  // namespace simt
