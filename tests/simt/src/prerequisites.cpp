#include <algorithm>
#include <cstring>
#include <ranges>

#include <simt/cluster.h>
#include <simt/prerequisites.h>
#include <simt/sanitizer.h>
#include <simt/shared_memory.h>

namespace simt {

namespace {

std::vector<Memory> given_memory;

std::byte* begin_of(const Memory& memory) { return static_cast<std::byte*>(memory.first); }

}  // namespace

void set_memory(std::vector<Memory> memory) { given_memory = std::move(memory); }

void Prerequisites::begin(bool starts_early) {
    is_early_ = pending_ = starts_early;
    waiting_.clear();
    has_waited_.assign(cluster_.size(), false);
    if (!starts_early) return;
    for (const Memory& memory : given_memory) {
        std::byte* first = begin_of(memory);
        hidden_.push_back({memory, {first, first + memory.bytes}});
        SharedMemory::poison(first, memory.bytes);
    }
    for (const Memory& memory : given_memory) sanitizer::poison(memory.first, memory.bytes);
}

void Prerequisites::wait(const Site& site) {
    Block& mine = block();
    has_waited_[mine.rank()] = true;
    if (!pending_) return;
    waiting_.emplace_back(&mine, mine.thread());
    mine.scheduler.park(*this, site);
}

void Prerequisites::check_ended(const Site& site) const {
    if (pending_) fail(to_string(site) + " before await_prerequisites: the kernel ahead may not have ended");
}

bool Prerequisites::hides(const void* address) const {
    return std::ranges::any_of(hidden_, [&](const Hidden& hidden) {
        const auto offset = static_cast<const std::byte*>(address) - begin_of(hidden.memory);
        return offset >= 0 && offset < hidden.memory.bytes;
    });
}

void Prerequisites::end() {
    unprotect();
    check_untouched();
    put_back();
    pending_ = false;
    for (const auto& [block, thread] : waiting_) block->scheduler.wake(thread);
    waiting_.clear();
}

void Prerequisites::check_untouched() const {
    for (const Hidden& hidden : hidden_) {
        const std::byte* first = begin_of(hidden.memory);
        if (SharedMemory::is_poison(first, hidden.memory.bytes)) continue;
        int64_t byte = 0;
        while (SharedMemory::is_poison(first + byte, 1)) ++byte;
        fail("byte " + std::to_string(byte) + " of " + hidden.memory.name +
             " was written before await_prerequisites: the kernel ahead may not have ended" + cluster_.standing());
    }
}

void Prerequisites::check_waited(int rank) const {
    if (is_early_ && !has_waited_[rank]) fail("the block has ended, and none of its threads has called await_prerequisites");
}

void Prerequisites::unprotect() const {
    for (const Hidden& hidden : hidden_) sanitizer::unpoison(hidden.memory.first, hidden.memory.bytes);
}

void Prerequisites::put_back() {
    unprotect();
    // In reverse: where memory overlaps, the first one hidden holds the original content.
    for (const auto& [memory, content] : std::views::reverse(hidden_))
        std::memcpy(memory.first, content.data(), content.size());
    hidden_.clear();
}

std::string Prerequisites::status() const {
    return "the kernel ahead: " + std::to_string(waiting_.size()) + " threads wait for its end";
}

}  // namespace simt
