// Launches that start before the earlier kernels on their stream have ended.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <simt/report.h>

namespace simt {

class Block;
class Cluster;

// Global memory of a kernel, with a name for reports.
struct Memory {
    const char* name;
    void* first;
    int64_t bytes;
};

// Sets all memory of the kernels in the following early launches; entries may overlap.
void set_memory(std::vector<Memory> memory);

// The earlier kernels of a launch that may start before they have ended. CUDA C++ Programming Guide, "Programmatic Dependent
// Launch and Synchronization". PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol", .wait:
// waits "until all prerequisite grids in flight have completed and all the memory operations from the prerequisite grids are
// performed and made visible to the current grid". Until then they may write what this kernel reads, and read or write what
// it writes. So here they end as late as they can, for each cluster separately: when none of its threads can go on without.
// Until then
//   - the memory holds the poison, and AddressSanitizer reports any access;
//   - what is written there is lost, and reported when they end;
//   - a copy by another unit of the hardware is reported when it starts, as it may take place at once.
// A thread that reads after a barrier which another thread reached after its own wait need not wait: what that thread waited
// for is visible to the grid. Reported: a block in which no thread has waited. The next kernel waits only for the end of
// this one, and might then start its work before the earlier ones have ended.
class Prerequisites final : public Waitable {
   public:
    explicit Prerequisites(const Cluster& cluster) : cluster_(cluster) {}

    // Before a cluster starts; `starts_early`: whether its launch does.
    void begin(bool starts_early);

    // griddepcontrol.wait.
    void wait(const Site& site);

    // Reports an operation that must not start before they have ended.
    void check_ended(const Site& site) const;

    // Whether no thread may access this address yet.
    bool hides(const void* address) const;

    bool are_pending() const { return pending_; }
    void end();

    // When all threads of a block have exited.
    void check_waited(int rank) const;

    // Restores the hidden memory, also after a report has ended the run.
    void put_back();

    std::string status() const override;

   private:
    struct Hidden {
        Memory memory;
        std::vector<std::byte> content;
    };

    void unprotect() const;  // from AddressSanitizer
    void check_untouched() const;

    const Cluster& cluster_;
    bool is_early_ = false, pending_ = false;
    std::vector<Hidden> hidden_;
    std::vector<bool> has_waited_;                 // whether a thread of the block has, by rank
    std::vector<std::pair<Block*, int>> waiting_;  // block and thread
};

}  // namespace simt
