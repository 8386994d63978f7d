// Instructions that the lanes of a warp or warpgroup execute together.
#pragma once
#include <string>
#include <typeinfo>
#include <vector>

#include <simt/scheduler.h>

namespace simt {

// The operands of each lane in a collective, by lane.
template <class Slot>
class Lanes {
   public:
    explicit Lanes(const std::vector<void*>& slots) : slots_(slots) {}

    int count() const { return static_cast<int>(slots_.size()); }
    Slot& operator[](int lane) const { return *static_cast<Slot*>(slots_[lane]); }

   private:
    const std::vector<void*>& slots_;
};

// A fixed group of a block's threads that executes instructions together: a warp, or four warps as one warpgroup.
class LaneGroup final : public Waitable {
   public:
    // Threads [first, first + lanes) of the block; `name` appears in reports, for example "warp 3".
    LaneGroup(Scheduler& scheduler, std::string name, int first, int lanes);

    // `threads`: the block's number of threads; the last group may lack some of its lanes.
    void reset(int threads);

    // Must be called when a thread of the group has exited.
    void thread_exited() {
        ++exited_;
        if (arrived_ > 0) check_complete(site_);
    }

    std::string status() const override;

   private:
    template <class Slot, class Compute>
    friend void collective(LaneGroup& group, const Site& site, Slot& mine, Compute&& compute);

    // Stores the current thread's operands; true for the last lane to arrive.
    bool arrive(const Site& site, const std::type_info& kind, void* operands);
    void wait(const Site& site) { scheduler_.park(*this, site); }
    void release();
    void check_complete(const Site& site) const;
    std::vector<int> lanes_at(bool arrived) const;

    Scheduler& scheduler_;
    std::string name_;
    int first_;
    int lanes_;
    int present_ = 0;
    int arrived_ = 0;
    int exited_ = 0;
    Site site_{};
    const std::type_info* kind_ = nullptr;
    std::vector<void*> operands_;  // by lane, null until it arrives; they point to the lanes' own stacks
};

// An instruction that all lanes of a group execute together. Each lane passes its operands in `mine` and gets its results
// there: the last lane to arrive calls compute(Lanes<Slot>) and releases the others. Reported: a lane that is at another
// collective, has exited, or does not exist.
template <class Slot, class Compute>
void collective(LaneGroup& group, const Site& site, Slot& mine, Compute&& compute) {
    if (!group.arrive(site, typeid(Slot), &mine)) return group.wait(site);
    compute(Lanes<Slot>(group.operands_));
    group.release();
}

}  // namespace simt
