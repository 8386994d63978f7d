// Shared memory as the async proxy sees it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include <simt/shared_memory.h>

namespace simt {

// The async proxy is the view of bulk copies and wgmma. PTX ISA, "Async Proxy": accessing the same memory location across
// multiple proxies needs a cross-proxy fence. So here it has a memory of its own:
//   - what a thread writes by a function of csrc/device reaches it when that thread executes fence.proxy.async; until then
//     it holds the poison there, as old or new values may be seen;
//   - what the async proxy writes reaches both, as the wait for it makes it visible to threads;
//   - an ordinary C++ store is not noticed, and never reaches it.
// A missing fence shows because the async proxy reads poison, and so does a write to memory that it is still reading.
class AsyncProxy {
   public:
    explicit AsyncProxy(const SharedMemory& shared) : shared_(shared) {}

    // Costs nothing for a block that never uses the async proxy.
    void reset(int threads);

    // Records a thread's write in the generic proxy, which has happened.
    void wrote(int thread, const std::byte* first, int64_t bytes);

    // PTX ISA, "Parallel Synchronization and Communication Instructions: membar, fence", fence.proxy.async: the async proxy
    // sees what the thread wrote from now on.
    void fence(int thread);

    // A bulk copy to these bytes is in flight: all reads see the poison.
    void poison(std::byte* first, int64_t bytes);

    // A write of the async proxy.
    void write(std::byte* destination, const void* source, int64_t bytes);

    // The async proxy's copy of an address of shared memory.
    const std::byte* view(const std::byte* address) const { return memory() + (address - shared_.data()); }

   private:
    struct Range {
        int32_t first, end;  // offsets in shared memory, in bytes
    };

    struct Notes {
        std::vector<Range> ranges;
        size_t merge_at = fewest_to_merge;  // the number of ranges at which they are sorted and merged
    };

    static constexpr size_t fewest_to_merge = 64;

    static void merge(Notes& notes);
    std::byte* memory() const;

    const SharedMemory& shared_;
    mutable std::vector<std::byte> memory_;
    mutable bool is_poisoned_ = false;  // memory_ has been poisoned for this block
    std::vector<Notes> unpublished_;    // by thread
    bool has_notes_ = false;            // some thread of this block has written
};

}  // namespace simt
