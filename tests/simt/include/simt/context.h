#pragma once
#include <cstddef>
#include <memory>

namespace simt {

// The processor-specific part of a fiber: registers and stack pointer of suspended code. Two files implement it, and the
// build links one: context_x86_64.cpp, fast, or context_ucontext.cpp, for any other processor.
struct Context;

struct ContextDeleter {
    void operator()(Context* context) const;
};
using ContextPtr = std::unique_ptr<Context, ContextDeleter>;

ContextPtr make_context();

// The first switch to `context` calls `entry`, which must never return, on the given stack.
void prepare_context(Context& context, void* stack_bottom, size_t stack_size, void (*entry)());

// Saves the running code in `from` and continues `to`. Floating-point control words need not be saved: kernels cannot change
// them.
void switch_context(Context& from, Context& to);

}  // namespace simt
