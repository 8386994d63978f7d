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

// Global memory that kernels are given, with a name for reports.
struct Memory {
    const char* name;
    void* first;
    int64_t bytes;
};

// All that the early launches that follow are given, which may overlap.
void set_memory(std::vector<Memory> memory);

// The kernels ahead of one that may start before they have ended. CUDA C++ Programming Guide, "Programmatic Dependent Launch
// and Synchronization". PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol", .wait: waits
// "until all prerequisite grids in flight have completed and all the memory operations from the prerequisite grids are
// performed and made visible to the current grid". Until then they may write what this one reads, and read or write what it
// writes. So here they end as late as they can, for each cluster anew: when none of its threads can go on without. Until
// then
//   - the memory holds the poison, and AddressSanitizer reports who touches it;
//   - what is written there is lost, and reported when they end;
//   - a copy by another unit of the hardware is reported when it starts, as it may take place at once.
// Whoever reads behind a barrier that another thread reached after its wait need not wait, as what it waited for is visible
// to the grid. Reported: a block without a thread that waited, as the kernel behind, whose wait is for the end of this one,
// might then start its work before those ahead have ended.
class Prerequisites final : public Waitable {
   public:
    explicit Prerequisites(const Cluster& cluster) : cluster_(cluster) {}

    // Before a cluster starts; `starts_early`: whether the launch does.
    void begin(bool starts_early);

    // griddepcontrol.wait.
    void wait(const Site& site);

    // For what may not start before they have ended.
    void check_ended(const Site& site) const;

    // Whether nobody may touch what lies there yet.
    bool hides(const void* address) const;

    bool are_pending() const { return pending_; }
    void end();

    // When all threads of a block have exited.
    void check_waited(int rank) const;

    // What is hidden comes back, also where a report has ended the run.
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
    std::vector<bool> has_waited_;                 // some thread of the block, by rank
    std::vector<std::pair<Block*, int>> waiting_;  // and the thread
};

}  // namespace simt
