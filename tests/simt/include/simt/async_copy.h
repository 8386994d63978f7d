#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include <simt/async_proxy.h>
#include <simt/shared_memory.h>

namespace simt {

// The copies that threads start and wait for later. PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy":
// cp.async, cp.async.commit_group, cp.async.wait_group. Until a copy is known to be complete its destination must be neither
// read nor written, and its source not written. So here a copy
//   - poisons its destination when it starts, as it may land at once;
//   - reads its source and lands when its thread waits for it, as it may take that long;
//   - is reported if its destination no longer holds the poison then.
// A copy that no wait covers never lands. At the end of the block it is dropped, or reported if its destination was written.
class AsyncCopies {
   public:
    AsyncCopies(SharedMemory& shared, AsyncProxy& proxy) : shared_(shared), proxy_(proxy) {}

    void reset(int threads);

    // Reported: addresses that are not multiples of `bytes`, a destination outside shared memory, a source that is read
    // before the earlier kernels have ended. Where `valid` is false the source is never read, and zeros land.
    void start(int thread, uint32_t destination, const void* source, int bytes, bool valid, const Site& site);

    void commit(int thread);

    // Lands the thread's committed groups except the latest `pending`, in the order of their commits.
    void wait(int thread, int pending);

    void check_never_landed() const;

   private:
    struct Copy {
        std::byte* destination;
        const void* source;
        int bytes;
        bool valid;
        Site site;
    };

    struct Queue {
        std::deque<Copy> copies;
        std::deque<int> groups;  // the number of copies in each committed group
        int uncommitted = 0;
    };

    void check_untouched(const Copy& copy, int thread) const;
    void land(const Copy& copy, int thread) const;

    SharedMemory& shared_;
    AsyncProxy& proxy_;
    std::vector<Queue> queues_;  // by thread
};

}  // namespace simt
