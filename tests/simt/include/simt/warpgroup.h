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

// What a thread brings to wgmma.mma_async, and all bring alike but for d.
struct ProductSlot {
    float* d;       // n / 2 accumulators
    uint64_t a, b;  // descriptors
    bool add;       // to the accumulators, which are overwritten otherwise
    Operand type;
    int n;
};

// d = a * b, or d += a * b, in [64, n] floats. PTX ISA, "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async":
// order and rounding of the sums are unspecified; here it is as in multiply_add.
void multiply_matrices(Operand type, const SharedMatrix& a, const SharedMatrix& b, const AsyncProxy& proxy, bool add,
                       float* d);

// Four warps that multiply together. PTX ISA, "Asynchronous wgmma Proxy Operations". Until a product is known to be complete
// its operands must not be written, nor its accumulators be touched. So here a product
//   - overwrites its accumulators with the poison when it starts, and is reported if they no longer hold it at the wait;
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

    // Reported: operands that differ between threads, descriptors that are not understood, accumulators that no fence orders
    // behind the threads' own accesses.
    void multiply_async(ProductSlot mine, const Site& site);

    void fence(const Site& site);
    void commit(const Site& site);

    // Until at most `pending` groups are.
    void wait(int pending, const Site& site);

    LaneGroup& lanes() { return group_; }

   private:
    // The accumulators of one array of each thread.
    struct Sums {
        std::array<float*, warpgroup_lanes> d;
        int n;
        std::vector<float>
            values;      // [64, n]: what the registers do not show while products are pending; what the last put there
        int pending;     // products
        Site site;       // of the latest
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
    std::deque<int> groups_;  // how many products each committed group has
    int uncommitted_ = 0;
    bool has_fenced_ = false;
};

class Warpgroups {
   public:
    Warpgroups(Scheduler& scheduler, const SharedMemory& shared, const AsyncProxy& proxy);

    void reset(int threads);
    Warpgroup& operator[](int thread) { return warpgroups_[thread / warpgroup_lanes]; }

    // PTX ISA, "Miscellaneous Instructions: setmaxnreg", .dec and .inc. How many registers a launch gives is not known here:
    // a change is checked against the one before of the same warpgroup, and all of them against what a multiprocessor has.
    // Reported: a count that is no multiple of 8 from 24 to 256, or differs between threads; giving up to more than there
    // are, or taking to fewer.
    void give_registers(int thread, int count, const Site& site) { set_registers(thread, count, false, site); }
    void take_registers(int thread, int count, const Site& site) { set_registers(thread, count, true, site); }

   private:
    void set_registers(int thread, int count, bool is_more, const Site& site);

    std::deque<Warpgroup> warpgroups_;
    std::vector<int> registers_;  // of a thread, by warpgroup; 0 where it was never set
};

}  // namespace simt
