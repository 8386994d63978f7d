#include <cstring>
#include <string>

#include <simt/phase_barrier.h>

namespace simt {

namespace {

// "Contents of the mbarrier object": the valid range of its counts.
constexpr int largest_count = (1 << 20) - 1;

constexpr int barrier_bytes = 8;
constexpr uint64_t mark = 0x6D62617272696572;  // "mbarrier"

bool has_mark(const std::byte* place) { return std::memcmp(place, &mark, barrier_bytes) == 0; }

std::string name_of(const Site& site, int byte) {
    return to_string(site) + " of the barrier at byte " + std::to_string(byte) + " of shared memory";
}

}  // namespace

void PhaseBarriers::init(uint32_t address, int arrivals, const Site& site) {
    std::byte* place = shared_.at(address, barrier_bytes, site);
    const int byte = static_cast<int>(place - shared_.data());
    if (arrivals < 1 || arrivals > largest_count)
        fail(name_of(site, byte) + " with " + std::to_string(arrivals) + " arrivals: there must be 1 to 1048575");
    // "mbarrier.init": on a memory location containing a valid mbarrier object the behaviour is undefined.
    if (barriers_.contains(address)) fail(name_of(site, byte) + ", which is there already");
    PhaseBarrier& barrier = barriers_[address];
    barrier.byte = byte;
    barrier.expected_arrivals = barrier.pending_arrivals = arrivals;
    barrier.made_by = scheduler_.current().index;
    std::memcpy(place, &mark, barrier_bytes);
}

void PhaseBarriers::publish(int thread) {
    for (auto& [address, barrier] : barriers_) {
        if (barrier.made_by == thread) barrier.is_published = true;
    }
}

PhaseBarriers::PhaseBarrier& PhaseBarriers::find(uint32_t address, const Site& site) {
    const std::byte* place = shared_.at(address, barrier_bytes, site);
    const auto found = barriers_.find(address);
    if (found == barriers_.end())
        fail(name_of(site, static_cast<int>(place - shared_.data())) + ", which was not initialised");
    if (!has_mark(place)) fail(name_of(site, found->second.byte) + ", which was overwritten");
    return found->second;
}

void PhaseBarriers::arrive(uint32_t address, int expected_bytes, const Site& site) {
    PhaseBarrier& barrier = find(address, site);
    if (expected_bytes < 0) fail(name_of(site, barrier.byte) + " with " + std::to_string(expected_bytes) + " bytes");
    if (barrier.pending_arrivals == 0)
        fail(name_of(site, barrier.byte) + " beyond the " + std::to_string(barrier.expected_arrivals) +
             " arrivals of phase " + std::to_string(barrier.phase) + ", which waits for " +
             std::to_string(barrier.pending_bytes) + " bytes");
    add_bytes(barrier, expected_bytes, site);
    --barrier.pending_arrivals;
    complete_phase_if_due(barrier);
}

void PhaseBarriers::complete_bytes(uint32_t address, int bytes, const Site& site) {
    PhaseBarrier& barrier = find(address, site);
    if (!barrier.is_published)
        fail(name_of(site, barrier.byte) + ", which thread " + std::to_string(barrier.made_by) +
             " made and did not publish: fence.mbarrier_init and fence.proxy.async are missing");
    add_bytes(barrier, -bytes, site);
    complete_phase_if_due(barrier);
}

void PhaseBarriers::add_bytes(PhaseBarrier& barrier, int bytes, const Site& site) const {
    const int64_t sum = int64_t{barrier.pending_bytes} + bytes;
    if (sum < -largest_count || sum > largest_count)
        fail(name_of(site, barrier.byte) + ": " + std::to_string(sum) + " pending bytes, beyond 1048575");
    barrier.pending_bytes = static_cast<int>(sum);
}

// "Phase Completion of the mbarrier object".
void PhaseBarriers::complete_phase_if_due(PhaseBarrier& barrier) const {
    if (barrier.pending_arrivals > 0 || barrier.pending_bytes != 0) return;
    ++barrier.phase;
    barrier.pending_arrivals = barrier.expected_arrivals;
    for (int thread : barrier.waiting) scheduler_.wake(thread);
    barrier.waiting.clear();
}

void PhaseBarriers::wait(uint32_t address, int parity, const Site& site) {
    PhaseBarrier& barrier = find(address, site);
    if (parity != 0 && parity != 1)
        fail(name_of(site, barrier.byte) + " for parity " + std::to_string(parity) + ": it must be 0 or 1");
    const int64_t phase = barrier.phase;
    if (phase % 2 != parity) return;
    barrier.waiting.push_back(scheduler_.current().index);
    scheduler_.park(barrier, site);
    // "mbarrier.test_wait / mbarrier.try_wait": valid for the current and the immediately preceding phase. A polling thread
    // could have missed the completion in between.
    if (barrier.phase > phase + 1)
        fail(name_of(site, barrier.byte) + ": thread " + std::to_string(scheduler_.current().index) + " waited for phase " +
             std::to_string(phase) + ", but before it went on, phase " + std::to_string(phase + 1) + " was complete too");
}

std::string PhaseBarriers::PhaseBarrier::status() const {
    return "barrier at byte " + std::to_string(byte) + " of shared memory: threads wait for parity " +
           std::to_string(phase % 2) + " (phase " + std::to_string(phase) + "), pending are " +
           std::to_string(pending_arrivals) + " of " + std::to_string(expected_arrivals) + " arrivals and " +
           std::to_string(pending_bytes) + " bytes";
}

}  // namespace simt
