// A stack switch by ucontext, for any processor.
#include <ucontext.h>

#include <simt/context.h>

namespace simt {

struct Context {
    ucontext_t registers;
};

void ContextDeleter::operator()(Context* context) const { delete context; }

ContextPtr make_context() { return ContextPtr(new Context); }

void prepare_context(Context& context, void* stack_bottom, size_t stack_size, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack_bottom;
    context.registers.uc_stack.ss_size = stack_size;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

}  // namespace simt
