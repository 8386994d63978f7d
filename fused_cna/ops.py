"""The operator ``torch.ops.fused_cna.conv_norm_act``, and which calls go to it.

``conv_norm_act_out`` writes into memory that it is given. It returns nothing, because torch.compile cannot
follow an operator that returns a slice which it was given.

The schemas and the fake, CPU and autocast kernels are here; the compiled extension adds those of CUDA and of
autograd, which have stand-ins here for where it is missing.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from fused_cna import _extension, config, eager
from fused_cna._checks import check_arguments, check_out
from fused_cna._memory import check_out_memory, refuse_gradient

_NAME, _OUT_NAME = "conv_norm_act", "conv_norm_act_out"
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, Tensor? running_var, float eps, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "str act, float[] act_params, Tensor? residual, str residual_order"
)

_library = torch.library.Library("fused_cna", "DEF")
_library.define(f"{_NAME}({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(f"{_OUT_NAME}({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)
# What both do where a gradient is wanted; the compiled extension calls them by name.
_library.define(f"_differentiable_{_NAME}({_ARGUMENTS}) -> Tensor")
_library.define(f"_differentiable_{_OUT_NAME}({_ARGUMENTS}, Tensor(a!) out) -> ()")
# What is refused, in words; the compiled extension calls it where its own conditions do not hold.
_library.define(f"_refuse({_ARGUMENTS}, Tensor? out) -> ()")
operator = torch.ops.fused_cna.conv_norm_act.default
"""The operator, for callers whose arguments are in the form of its schema and whose tensors are on a GPU."""
out_operator = torch.ops.fused_cna.conv_norm_act_out.default
"""The same with the memory for the output as its last argument."""

TENSORS = {
    "x": 0,
    "weight": 1,
    "bias": 2,
    "norm_weight": 3,
    "norm_bias": 4,
    "running_mean": 5,
    "running_var": 6,
    "residual": 14,
}
"""Where the operator's tensors are in its arguments."""
_AUTOCAST_TENSORS = ("x", "weight", "bias", "residual")


FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _no_kernel_takes(dtype: torch.dtype) -> str:
    return f"no kernel takes {dtype}; there are kernels for float32, float16 and bfloat16"


def _empty_output(x: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for the output in the memory format that torch's conv2d would return."""
    channels_last = x.shape[0] != 0 and torch.channels_last in (
        suggest_memory_format(x),
        suggest_memory_format(weight),
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _tensors_of(args: Sequence[Any]) -> dict[str, Tensor | None]:
    return {name: args[i] for name, i in TENSORS.items()}


def _check_all(args: Sequence[Any], out: Tensor) -> None:
    check_out(out, check_arguments(*args), args[0])
    check_out_memory(out, _tensors_of(args))


def _refuse(*args: Any) -> None:
    *arguments, out = args
    shape = check_arguments(*arguments)
    if arguments[0].dtype not in FUSED_DTYPES:
        raise RuntimeError(
            f"{_no_kernel_takes(arguments[0].dtype)}. Convert the input, or call fused_cna.conv_norm_act, "
            "which falls back to eager PyTorch"
        )
    if out is not None:
        check_out(out, shape, arguments[0])
        check_out_memory(out, _tensors_of(arguments))


@torch.library.register_fake(f"fused_cna::{_NAME}", lib=_library)
def _fake(*args: Any) -> Tensor:
    return _empty_output(args[0], args[1], check_arguments(*args))


@torch.library.register_fake(f"fused_cna::{_OUT_NAME}", lib=_library)
def _fake_out(*args: Any) -> None:
    *arguments, out = args
    _check_all(arguments, out)


def _eager_kernel(*args: Any) -> Tensor:
    check_arguments(*args)
    y = eager.conv_norm_act(*args)
    out = _empty_output(args[0], args[1], y.shape)
    return y if y.stride() == out.stride() else out.copy_(y)


def _eager_out_kernel(*args: Any) -> None:
    *arguments, out = args
    _check_all(arguments, out)
    out.copy_(eager.conv_norm_act(*arguments))


def _cuda_kernel_without_extension(*args: Any) -> Tensor:
    _fall_back(_extension.unavailable_reason())
    return _eager_kernel(*args)


def _cuda_out_kernel_without_extension(*args: Any) -> None:
    _fall_back(_extension.unavailable_reason())
    _eager_out_kernel(*args)


def _wants_gradient(args: Sequence[Any]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    tensors = (args[i] for i in TENSORS.values())
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _differentiable(*args: Any) -> Tensor:
    check_arguments(*args)
    return eager.conv_norm_act(*args)


def _refuse_to_differentiate(*args: Any) -> None:
    refuse_gradient([*_tensors_of(args).values(), args[-1]])


def _autograd_kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    if _wants_gradient(args):
        return _differentiable(*args)
    return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_out_kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
    _refuse_to_differentiate(*args)
    out_operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autocast(args: Sequence[Any], device_type: str) -> list[Any]:
    """The arguments as autocast wants them: all tensors cast but the norm vectors."""
    dtype = torch.get_autocast_dtype(device_type)
    cast = list(args)
    for name in _AUTOCAST_TENSORS:
        tensor = cast[TENSORS[name]]
        if (
            isinstance(tensor, Tensor)
            and tensor.device.type == device_type
            and tensor.is_floating_point()
            and tensor.dtype != torch.float64
        ):
            cast[TENSORS[name]] = tensor.to(dtype)
    return cast


def _register_autocast(name: str, call: Callable[..., Any], device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast_kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return call(*_autocast(args, device_type))

    _library.impl(name, autocast_kernel, key)


_library.impl(_NAME, _eager_kernel, "CPU")
_library.impl(_OUT_NAME, _eager_out_kernel, "CPU")
_library.impl("_refuse", _refuse, "CompositeImplicitAutograd")
_library.impl(f"_differentiable_{_NAME}", _differentiable, "CompositeImplicitAutograd")
_library.impl(f"_differentiable_{_OUT_NAME}", _refuse_to_differentiate, "CompositeImplicitAutograd")
for _name, _operator in ((_NAME, operator), (_OUT_NAME, out_operator)):
    _register_autocast(_name, _operator, "cuda", "AutocastCUDA")
    _register_autocast(_name, _operator, "cpu", "AutocastCPU")
# The extension has kernels of its own for these keys.
if not _extension.is_available():
    _library.impl(_NAME, _autograd_kernel, "Autograd", with_keyset=True)
    _library.impl(_OUT_NAME, _autograd_out_kernel, "Autograd", with_keyset=True)
    _library.impl(_NAME, _cuda_kernel_without_extension, "CUDA")
    _library.impl(_OUT_NAME, _cuda_out_kernel_without_extension, "CUDA")


def device_obstacle(index: int) -> str:
    """Why the kernels in the extension cannot run on CUDA device ``index``; empty if they can."""
    major, minor = torch.cuda.get_device_capability(index)
    device = f"{torch.cuda.get_device_name(index)} with compute capability {major}.{minor}"
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer, but this is {device}"
    architectures: list[str] = _extension.build_info()["architectures"]
    if any(_runs_on(architecture, major, minor) for architecture in architectures):
        return ""
    return (
        f"the extension was compiled for {', '.join(architectures)}, none of which runs on {device}; "
        f"rebuild fused_cna with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture as nvcc names it runs on a GPU of this compute capability."""
    kind, _, digits = architecture.partition("_")
    built = divmod(int(digits.rstrip("af")), 10)
    if digits.endswith("a"):  # sm_90a: that GPU and no other
        return built == (major, minor)
    if kind == "compute":  # PTX, which the driver compiles for newer GPUs
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


operator_everywhere = False
"""Whether calls on devices other than CUDA go to the operator too, so that tuning sees what a GPU would."""

_device_obstacles: dict[int, str] = {}
_warned_about: set[str] = set()


@eager.constant_under_compile
def _obstacle(dtype: torch.dtype, device_index: int) -> str:
    """Why a call on this CUDA device cannot be fused; empty if it can."""
    if not _extension.is_available():
        return _extension.unavailable_reason()
    if dtype not in FUSED_DTYPES:
        return _no_kernel_takes(dtype)
    if device_index not in _device_obstacles:
        _device_obstacles[device_index] = device_obstacle(device_index)
    return _device_obstacles[device_index]


def _fall_back(reason: str) -> None:
    """Say once per reason, or refuse if strict, that a call on CUDA tensors runs as eager PyTorch."""
    message = f"fused_cna runs eager PyTorch instead of its CUDA kernel: {reason}"
    if config.strict:
        raise RuntimeError(f"{message} (an error because fused_cna.config.strict is True)")
    if reason in _warned_about or torch.compiler.is_compiling():
        return
    _warned_about.add(reason)
    warnings.warn(message, config.FusionFallbackWarning, stacklevel=4)


def takes_kernel(x: Tensor) -> bool:
    """Whether a call with input ``x`` goes to the operator; where a CUDA tensor cannot, says why.

    ONNX has no such operator, so its exporters see plain PyTorch.

    Raises:
        RuntimeError: a CUDA tensor cannot and ``fused_cna.config.strict`` is True.
    """
    if not (x.is_cuda or operator_everywhere):
        return False
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if is_traced and torch.onnx.is_in_onnx_export():
        return False
    if not x.is_cuda:
        return True
    reason = _obstacle(x.dtype, x.device.index)
    if reason:
        _fall_back(reason)
    return not reason


def compute_eagerly(arguments: Sequence[Any], out: Tensor | None = None) -> Tensor:
    """The result for the operator's arguments by plain PyTorch, which compilers see through."""
    device_type = arguments[0].device.type
    if eager.is_autocast_enabled(device_type):
        arguments = _autocast(arguments, device_type)
    if out is None:
        check_arguments(*arguments)
        return eager.conv_norm_act(*arguments)
    refuse_gradient([*_tensors_of(arguments).values(), out])
    _check_all(arguments, out)
    return out.copy_(eager.conv_norm_act(*arguments))


def write_into(out: Tensor, arguments: Sequence[Any], *, kernel: bool) -> Tensor:
    """Write the result for the operator's arguments into ``out``, by the kernel or eagerly, and return it."""
    if not kernel:
        return compute_eagerly(arguments, out)
    out_operator(*arguments, out)
    return out


def copy_into(out: Tensor, y: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    """Copy a result that no kernel could write there into ``out``, which is refused as the operator would."""
    refuse_gradient((y, out))
    check_out(out, y.shape, y)
    check_out_memory(out, {"x": x, "residual": residual})
    return out.copy_(y)
