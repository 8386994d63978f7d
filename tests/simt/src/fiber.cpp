#include <simt/fiber.h>
#include <simt/sanitizer.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <system_error>

namespace simt {

namespace {

// Pages are committed when touched. Frames of sanitized code are several times as large.
constexpr size_t stack_bytes = sanitizer::enabled ? 512 * 1024 : 128 * 1024;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

struct Host {
    ContextPtr context = make_context();
    const void* stack_bottom = nullptr;
    size_t stack_size = 0;
    void* fake_stack = nullptr;
};

Host host;
Fiber* running = nullptr;

}  // namespace

Fiber::Fiber(int number) : context_(make_context()) {
    size_t guard = page_bytes();
    void* mapping =
        mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of a fiber's stack");
    mapping_ = static_cast<char*>(mapping);
    if (mprotect(mapping_, guard, PROT_NONE) != 0)
        throw std::system_error(errno, std::generic_category(), "mprotect of a fiber's guard page");
    stack_bottom_ = mapping_ + guard;
    // Stacks that all start page-aligned would compete for a few cache sets.
    constexpr size_t spread = 5 * 64, cache_way = 4096;
    stack_size_ = stack_bytes - static_cast<size_t>(number) * spread % cache_way;
}

Fiber::~Fiber() {
    sanitizer::unpoison(stack_bottom_, stack_bytes);
    munmap(mapping_, page_bytes() + stack_bytes);
}

void Fiber::start(Entry entry, void* argument) {
    // Frames abandoned after a report leave their redzones poisoned.
    sanitizer::unpoison(stack_bottom_, stack_bytes);
    entry_ = entry;
    argument_ = argument;
    fake_stack_ = nullptr;
    prepare_context(*context_, stack_bottom_, stack_size_, &Fiber::run);
}

void Fiber::resume() {
    running = this;
    sanitizer::start_switch(&host.fake_stack, stack_bottom_, stack_size_);
    switch_context(*host.context, *context_);
    sanitizer::finish_switch(host.fake_stack, nullptr, nullptr);
    running = nullptr;
}

void Fiber::suspend() { leave(false); }

void Fiber::leave(bool for_ever) {
    sanitizer::start_switch(for_ever ? nullptr : &fake_stack_, host.stack_bottom, host.stack_size);
    switch_context(*context_, *host.context);
    sanitizer::finish_switch(fake_stack_, &host.stack_bottom, &host.stack_size);
}

void Fiber::run() {
    sanitizer::finish_switch(nullptr, &host.stack_bottom, &host.stack_size);
    Fiber& self = *running;
    self.entry_(self.argument_);
    self.leave(true);
    std::abort();
}

}  // namespace simt
