#pragma once
#include <cstdint>
#include <map>

#include <simt/scheduler.h>
#include <simt/shared_memory.h>

namespace simt {

// The block's mbarrier objects, by their addresses. PTX ISA, "Parallel Synchronization and Communication Instructions:
// mbarrier". Their counts are kept here; the 8 bytes in shared memory hold a mark that whatever else writes there destroys.
class PhaseBarriers {
   public:
    PhaseBarriers(Scheduler& scheduler, const SharedMemory& shared) : scheduler_(scheduler), shared_(shared) {}

    // By the current thread. Reported: a count outside 1 to 2^20 - 1, a barrier that is there already.
    void init(uint32_t address, int arrivals, const Site& site);

    // fence.mbarrier_init and fence.proxy.async: the thread's barriers may be used by other units of the hardware.
    void publish(int thread);

    // "mbarrier.arrive", with .expect_tx where bytes are expected: first expect-tx, then arrive-on by 1.
    // Reported, as for all below: a barrier that was never made or has been overwritten. More arrivals than expected.
    void arrive(uint32_t address, int expected_bytes, const Site& site);

    // "complete-tx operation", by a bulk copy: before or after they are expected. Reported: a barrier that is not published.
    void complete_bytes(uint32_t address, int bytes, const Site& site);

    // "mbarrier.try_wait", .parity, until it is true: until the phase of this parity is complete, the current one or the one
    // before. Reported: a thread that was late, so that the phase behind it is complete too.
    void wait(uint32_t address, int parity, const Site& site);

    void reset() { barriers_.clear(); }

   private:
    struct PhaseBarrier final : Waitable {
        std::string status() const override;

        int byte = 0;               // of shared memory
        int expected_arrivals = 0;  // of every phase
        int pending_arrivals = 0;   // of the current one
        int pending_bytes = 0;      // likewise: the tx-count, negative where bytes came before they were expected
        int64_t phase = 0;          // how many are complete
        int made_by = 0;            // a thread
        bool is_published = false;
        std::vector<int> waiting;  // threads, for the current phase
    };

    PhaseBarrier& find(uint32_t address, const Site& site);
    void add_bytes(PhaseBarrier& barrier, int bytes, const Site& site) const;
    void complete_phase_if_due(PhaseBarrier& barrier) const;

    Scheduler& scheduler_;
    const SharedMemory& shared_;
    std::map<uint32_t, PhaseBarrier> barriers_;
};

}  // namespace simt
