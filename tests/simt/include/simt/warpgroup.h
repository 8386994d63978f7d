// wgmma and setmaxnreg.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include <simt/collective.h>
#include <simt/matrix_descriptor.h>
#include <simt/operand.h>

namespace simt {

inline constexpr int warpgroup_lanes = 128;

// A thread's operands of wgmma.mma_async; all but d are the same for all threads.
struct ProductSlot {
    float* d;       // n / 2 accumulators
    uint64_t a, b;  // descriptors
    bool add;       // to the accumulators; otherwise they are overwritten
    Operand type;
    int n;
};

// d = a * b, or d += a * b, in [64, n] floats. PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async":
// order and rounding of the sums are unspecified; here they are as in multiply_add.
void multiply_matrices(Operand type, const SharedMatrix& a, const SharedMatrix& b, const AsyncProxy& proxy, bool add,
                       float* d);

// Four warps that multiply together. PTX ISA, "Asynchronous wgmma Proxy Operations". Until a product is known to be
// complete, its operands must not be written and its accumulators not accessed. So here a product
//   - poisons its accumulators when it starts, and is reported if they no longer hold the poison at the wait;
//   - reads its operands when its group is waited for, as it may take that long.
class Warpgroup {
   public:
    Warpgroup(Scheduler& scheduler, const SharedMemory& shared, const AsyncProxy& proxy, int number);

    void reset(int threads);

    // Reported: a thread that exits while products are pending.
    void thread_exited(int thread) {
        group_.thread_exited();
        if (!products_.empty()) report_unfinished(thread);
    }

    // Reported: operands that differ between threads, unsupported descriptors, accumulators without a fence after the
    // threads' own accesses.
    void multiply_async(ProductSlot mine, const Site& site);

    void fence(const Site& site);
    void commit(const Site& site);

    // Until at most `pending` groups are pending.
    void wait(int pending, const Site& site);

    LaneGroup& lanes() { return group_; }

   private:
    // One array of accumulators in each thread.
    struct Sums {
        std::array<float*, warpgroup_lanes> d;
        int n;
        std::vector<float>
            values;      // [64, n]: the sums; pending products poison the registers, and this holds them until the wait
        int pending;     // the number of pending products
        Site site;       // of the latest product
        bool is_fenced;  // since the threads got them back
    };

    struct Product {
        SharedMatrix a, b;
        bool add;
        Operand type;
        Sums* sums;
    };

    void start(const Lanes<ProductSlot>& lanes, const Site& site);
    Sums& take(const Lanes<ProductSlot>& lanes, const Site& site);
    void check_fence(const Sums& known, bool add, const Site& site) const;
    void give_back(Sums& sums) const;
    void finish_group();
    [[noreturn]] void report_unfinished(int thread) const;

    const SharedMemory& shared_;
    const AsyncProxy& proxy_;
    std::string name_;
    int first_;
    LaneGroup group_;
    std::list<Sums> sums_;
    std::deque<Product> products_;
    std::deque<int> groups_;  // the number of products in each committed group
    int uncommitted_ = 0;
    bool has_fenced_ = false;
};

class Warpgroups {
   public:
    Warpgroups(Scheduler& scheduler, const SharedMemory& shared, const AsyncProxy& proxy);

    void reset(int threads);
    Warpgroup& operator[](int thread) { return warpgroups_[thread / warpgroup_lanes]; }

    // PTX ISA, "Miscellaneous Instructions: setmaxnreg", .dec and .inc. The launch's number of registers is not known here:
    // a change is checked against the warpgroup's previous one, and the sum against a multiprocessor's registers. Reported:
    // a count that is not a multiple of 8 from 24 to 256, or differs between threads; giving up to a higher count, or taking
    // to a lower one.
    void give_registers(int thread, int count, const Site& site) { set_registers(thread, count, false, site); }
    void take_registers(int thread, int count, const Site& site) { set_registers(thread, count, true, site); }

   private:
    void set_registers(int thread, int count, bool is_more, const Site& site);

    std::deque<Warpgroup> warpgroups_;
    std::vector<int> registers_;  // per thread, by warpgroup; 0 where never set
};

}  // namespace simt
