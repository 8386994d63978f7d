// A stack switch for x86-64, in assembly.
#include <simt/context.h>
#include <cstdint>

// System V ABI, "Registers and the Stack Frame": rbx, rbp and r12-r15 belong to the calling function; a call may change all
// others. So saving these six and exchanging the stack pointer is a whole switch.
extern "C" void simt_switch_stack(void** from_stack_pointer, void* to_stack_pointer);

asm(R"(
    .text
    .globl simt_switch_stack
    .hidden simt_switch_stack
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch_stack, . - simt_switch_stack
)");

namespace simt {

struct Context {
    void* stack_pointer = nullptr;
};

void ContextDeleter::operator()(Context* context) const { delete context; }

ContextPtr make_context() { return ContextPtr(new Context); }

void prepare_context(Context& context, void* stack_bottom, size_t stack_size, void (*entry)()) {
    constexpr int saved_registers = 6;
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack_bottom) + stack_size) & ~uintptr_t{15};
    uintptr_t* slot = reinterpret_cast<uintptr_t*>(top);
    *--slot = 0;  // the return address of entry, where unwinding ends
    *--slot = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < saved_registers; ++i) *--slot = 0;
    context.stack_pointer = slot;
}

void switch_context(Context& from, Context& to) { simt_switch_stack(&from.stack_pointer, to.stack_pointer); }

}  // namespace simt
