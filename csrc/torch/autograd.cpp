// The operators at autograd's dispatch keys. Most calls want no gradient and go straight on to the kernel below. Unboxed, as
// calls from C++ arrive: boxing sixteen arguments takes half a microsecond.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <utility>

#include "torch/signature.h"

namespace fused_cna {

namespace {

using at::Tensor;

bool wants_gradient(const Tensor& tensor) {
    return (at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}
bool wants_gradient(const MaybeTensor& tensor) { return tensor && wants_gradient(*tensor); }
bool wants_gradient(const auto&) { return false; }

constexpr char conv_norm_act[] = "fused_cna::conv_norm_act";
constexpr char conv_norm_act_out[] = "fused_cna::conv_norm_act_out";
constexpr char dry_run[] = "fused_cna::_dry_run";
constexpr char differentiable[] = "fused_cna::_differentiable_conv_norm_act";
constexpr char differentiable_out[] = "fused_cna::_differentiable_conv_norm_act_out";

template <class Signature>
auto find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// With a gradient, the operator's twin in fused_cna/ops.py runs instead: it is differentiable, or raises where the result
// goes into given memory.
template <const char* name, const char* twin, class Signature>
struct WithAutograd;
template <const char* name, const char* twin, class Result, class... Arguments>
struct WithAutograd<name, twin, Result(Arguments...)> {
    static Result call(c10::DispatchKeySet keys, Arguments... arguments) {
        static const auto below = find<Result(Arguments...)>(name);
        if (!(wants_gradient(arguments) || ...)) {
            return below.redispatch(keys & c10::after_autograd_keyset, std::forward<Arguments>(arguments)...);
        }
        static const auto with_gradient = find<Result(Arguments...)>(twin);
        return with_gradient.call(std::forward<Arguments>(arguments)...);
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_cna, Autograd, m) {
    m.impl("conv_norm_act", TORCH_FN((WithAutograd<conv_norm_act, differentiable, OperatorSignature>::call)));
    m.impl("conv_norm_act_out", TORCH_FN((WithAutograd<conv_norm_act_out, differentiable_out, OutOperatorSignature>::call)));
    m.impl("_dry_run", TORCH_FN((WithAutograd<dry_run, differentiable, OperatorSignature>::call)));
}

}  // namespace fused_cna
