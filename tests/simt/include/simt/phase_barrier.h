#pragma once
#include <cstdint>
#include <map>

#include <simt/scheduler.h>
#include <simt/shared_memory.h>

namespace simt {

// The block's mbarrier objects, by address. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
// The counts are kept here; the 8 bytes in shared memory hold a mark, which any other write destroys.
class PhaseBarriers {
   public:
    PhaseBarriers(Scheduler& scheduler, const SharedMemory& shared) : scheduler_(scheduler), shared_(shared) {}

    // By the current thread. Reported: a count outside 1 to 2^20 - 1, an address that already has a barrier.
    void init(uint32_t address, int arrivals, const Site& site);

    // fence.mbarrier_init and fence.proxy.async: the thread's barriers may be used by other units of the hardware.
    void publish(int thread);

    // "mbarrier.arrive", with .expect_tx where bytes are expected: first expect-tx, then arrive-on by 1. Reported, as for
    // all below: a barrier that was never initialised or was overwritten. Also more arrivals than expected.
    void arrive(uint32_t address, int expected_bytes, const Site& site);

    // "complete-tx operation", by a bulk copy, before or after the bytes are expected. Reported: an unpublished barrier.
    void complete_bytes(uint32_t address, int bytes, const Site& site);

    // "mbarrier.try_wait", .parity, until it is true: until the phase of this parity, the current or the preceding one, is
    // complete. Reported: a thread that resumes so late that the next phase is complete too.
    void wait(uint32_t address, int parity, const Site& site);

    void reset() { barriers_.clear(); }

   private:
    struct PhaseBarrier final : Waitable {
        std::string status() const override;

        int byte = 0;               // of shared memory
        int expected_arrivals = 0;  // of every phase
        int pending_arrivals = 0;   // of the current one
        int pending_bytes = 0;      // the tx-count of the current phase; negative where bytes came before they were expected
        int64_t phase = 0;          // the number of complete phases
        int made_by = 0;            // the initialising thread
        bool is_published = false;
        std::vector<int> waiting;  // threads that wait for the current phase
    };

    PhaseBarrier& find(uint32_t address, const Site& site);
    void add_bytes(PhaseBarrier& barrier, int bytes, const Site& site) const;
    void complete_phase_if_due(PhaseBarrier& barrier) const;

    Scheduler& scheduler_;
    const SharedMemory& shared_;
    std::map<uint32_t, PhaseBarrier> barriers_;
};

}  // namespace simt
