#pragma once
#include <simt/context.h>
#include <cstddef>

namespace simt {

// A function that can be suspended and resumed, on its own stack. One host thread drives all fibers.
class Fiber {
   public:
    using Entry = void (*)(void* argument);

    // `number` only spreads the stacks over the cache sets.
    explicit Fiber(int number);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() calls `entry(argument)`. Anything suspended here before is dropped without unwinding. `entry` must
    // not let an exception out: unwinding cannot cross to another stack.
    void start(Entry entry, void* argument);

    // On the host's stack: runs the fiber until it suspends or its entry returns.
    void resume();

    // On the fiber's own stack: returns to resume()'s caller.
    void suspend();

   private:
    static void run();
    void leave(bool for_ever);

    char* mapping_;
    char* stack_bottom_;
    size_t stack_size_;
    ContextPtr context_;
    Entry entry_ = nullptr;
    void* argument_ = nullptr;
    void* fake_stack_ = nullptr;
};

}  // namespace simt
