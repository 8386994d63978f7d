#pragma once
#include <array>
#include <vector>

#include <simt/scheduler.h>

namespace simt {

// One of the block's sixteen barriers. PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier".
class Barrier final : public Waitable {
   public:
    Barrier(Scheduler& scheduler, int id) : scheduler_(scheduler), id_(id) {}

    // bar.sync id: waits for every thread of the block that has not exited. CUDA C++ Programming Guide, "Independent Thread
    // Scheduling": since compute capability 7.0 it is enforced per thread, and for all non-exited threads in the block.
    void wait_for_block(const Site& site) { arrive(whole_block, site); }

    // bar.sync id, threads: waits for that many threads; exited ones do not count.
    void wait_for(int threads, const Site& site);

    // Barriers of the whole block stop waiting for this thread.
    void thread_exited();

    void reset();
    std::string status() const override;

   private:
    static constexpr int whole_block = 0;

    void arrive(int threads, const Site& site);
    void check_agreement(int threads, const Site& site) const;
    void check_whole_warps() const;
    std::string meeting(const Site& site) const;
    int wanted() const { return threads_ == whole_block ? scheduler_.live() : threads_; }
    void release(int running);

    Scheduler& scheduler_;
    int id_;
    int threads_ = whole_block;  // the count of the first thread to arrive
    Site site_{};                // the place of the first thread to arrive
    std::vector<int> arrived_;
};

// PTX ISA, "bar, barrier": each block has sixteen, numbered 0 to 15; sync_threads is number 0.
class Barriers {
   public:
    explicit Barriers(Scheduler& scheduler);

    Barrier& block() { return barriers_[0]; }
    Barrier& named(int id);
    void reset();

   private:
    std::vector<Barrier> barriers_;
};

}  // namespace simt
