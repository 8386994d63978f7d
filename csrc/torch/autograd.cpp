// The operators at autograd's dispatch keys. Nearly every call wants no gradient, and goes on at once to the kernel below;
// in Python that decision took longer than launching the kernel does.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

namespace fused_cna {

namespace {

using torch::jit::Stack;

bool wants_gradient(const at::Tensor& tensor) {
    if (!tensor.defined()) return false;
    return (at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}

// Boxed, because sizes among the arguments may be symbolic. With a gradient the operator's twin in fused_cna/ops.py runs,
// which is differentiable, or refuses where the result goes into given memory.
void with_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    const bool wanted = std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& argument) {
        return argument.isTensor() && wants_gradient(argument.toTensor());
    });
    if (!wanted) return op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    const std::string name = op.schema().name();
    const std::string twin = "fused_cna::_differentiable_" + name.substr(name.rfind(':') + 1);
    c10::Dispatcher::singleton().findSchemaOrThrow(twin.c_str(), "").callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_cna, Autograd, m) {
    m.impl("conv_norm_act", torch::CppFunction::makeFromBoxedFunction<&with_autograd>());
    m.impl("conv_norm_act_out", torch::CppFunction::makeFromBoxedFunction<&with_autograd>());
}

}  // namespace fused_cna
