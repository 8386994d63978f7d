#include <cstdint>
#include <cstring>
#include <string>

#include <simt/async_copy.h>
#include <simt/cluster.h>
#include <simt/sanitizer.h>

namespace simt {

namespace {

void check_source(const void* source, int bytes, bool valid, const Site& site) {
    // PTX ISA, "Addresses as Operands": an address must be a multiple of the access's size, even where nothing is read.
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0)
        fail(to_string(site) + " from a global address that is not a multiple of " + std::to_string(bytes));
    // Makes AddressSanitizer report where the copy was started, not where it was waited for.
    if (sanitizer::enabled && valid) {
        const volatile char* first = static_cast<const char*>(source);
        for (int i = 0; i < bytes; ++i) (void)first[i];
    }
}

}  // namespace

void AsyncCopies::reset(int threads) {
    queues_.resize(threads);
    for (Queue& queue : queues_) {
        queue.copies.clear();
        queue.groups.clear();
        queue.uncommitted = 0;
    }
}

void AsyncCopies::start(int thread, uint32_t destination, const void* source, int bytes, bool valid, const Site& site) {
    if (valid) block().cluster().prerequisites.check_ended(site);
    check_source(source, bytes, valid, site);
    std::byte* first = shared_.at(destination, bytes, site);
    SharedMemory::poison(first, bytes);
    queues_[thread].copies.push_back({first, source, bytes, valid, site});
    ++queues_[thread].uncommitted;
}

void AsyncCopies::commit(int thread) {
    Queue& queue = queues_[thread];
    queue.groups.push_back(queue.uncommitted);
    queue.uncommitted = 0;
}

void AsyncCopies::wait(int thread, int pending) {
    Queue& queue = queues_[thread];
    while (static_cast<int>(queue.groups.size()) > pending) {
        for (int i = 0; i < queue.groups.front(); ++i) {
            land(queue.copies.front(), thread);
            queue.copies.pop_front();
        }
        queue.groups.pop_front();
    }
}

void AsyncCopies::land(const Copy& copy, int thread) const {
    check_untouched(copy, thread);
    if (copy.valid) {
        std::memcpy(copy.destination, copy.source, copy.bytes);
    } else {
        std::memset(copy.destination, 0, copy.bytes);
    }
    // PTX ISA, "Async Proxy": only bulk copies are performed in the async proxy.
    proxy_.wrote(thread, copy.destination, copy.bytes);
}

void AsyncCopies::check_never_landed() const {
    for (size_t thread = 0; thread < queues_.size(); ++thread) {
        for (const Copy& copy : queues_[thread].copies) check_untouched(copy, static_cast<int>(thread));
    }
}

void AsyncCopies::check_untouched(const Copy& copy, int thread) const {
    if (SharedMemory::is_poison(copy.destination, copy.bytes)) return;
    fail("byte " + std::to_string(copy.destination - shared_.data()) + " of shared memory was written while thread " +
         std::to_string(thread) + "'s " + to_string(copy.site) + " to it was under way");
}

}  // namespace simt
