#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include <simt/shared_memory.h>

namespace simt {

// Shared memory as the async proxy sees it, that is bulk copies and wgmma. PTX ISA, "Async Proxy": accessing the same memory
// location across multiple proxies needs a cross-proxy fence. So here it is a memory of its own:
//   - what a thread writes by a function of the seam reaches it when that thread executes fence.proxy.async; until then it
//     has the poison there, as old or new may be seen;
//   - what the async proxy writes reaches both, as the wait for it makes it visible to threads;
//   - an ordinary store of C++ is not noticed, and never reaches it.
// A missing fence shows: the async proxy reads poison. So does a write to what the async proxy is still reading.
class AsyncProxy {
   public:
    explicit AsyncProxy(const SharedMemory& shared) : shared_(shared) {}

    // A block that never uses the async proxy pays nothing for it.
    void reset(int threads);

    // A thread's write in the generic proxy, which has happened.
    void wrote(int thread, const std::byte* first, int64_t bytes);

    // PTX ISA, "Parallel Synchronization and Communication Instructions: membar, fence", fence.proxy.async: what the thread
    // wrote is seen by the async proxy from now on.
    void fence(int thread);

    // A bulk copy to these bytes is under way: whoever reads them reads the poison.
    void poison(std::byte* first, int64_t bytes);

    // A write of the async proxy.
    void write(std::byte* destination, const void* source, int64_t bytes);

    // Where the async proxy sees what lies at an address of shared memory.
    const std::byte* view(const std::byte* address) const { return memory() + (address - shared_.data()); }

   private:
    struct Range {
        int32_t first, end;  // as bytes of shared memory
    };

    struct Notes {
        std::vector<Range> ranges;
        size_t merge_at = fewest_to_merge;  // how many there may be before they are sorted and merged
    };

    static constexpr size_t fewest_to_merge = 64;

    static void merge(Notes& notes);
    std::byte* memory() const;

    const SharedMemory& shared_;
    mutable std::vector<std::byte> memory_;
    mutable bool is_poisoned_ = false;  // memory_ is that of this block
    std::vector<Notes> unpublished_;    // by thread
    bool has_notes_ = false;            // some thread of this block wrote something
};

}  // namespace simt
