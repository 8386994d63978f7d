"""Convolution, batch norm, residual and activation in plain PyTorch: the fallback."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_cna import activation
from fused_cna._checks import check_residual, check_residual_order


def constant_under_compile(function: Any) -> Any:
    """As ``torch.compiler.assume_constant_result``, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


@constant_under_compile
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; those that have none, such as meta, refuse to be asked."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def add_residual(z: Tensor, residual: Tensor, inplace: bool = False) -> Tensor:
    """``z + residual`` without broadcasting or type promotion; under autocast the residual is cast.

    With ``inplace`` the sum may take the memory of ``z``.

    Raises:
        RuntimeError: the residual has not the shape, dtype or device of ``z``.
        TypeError: it is no tensor.
    """
    if isinstance(z, torch.fx.Proxy):  # torch.fx.symbolic_trace: there is nothing to check yet
        return z + residual
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None, but got {type(residual).__name__}")
    if residual.dtype != z.dtype and is_autocast_enabled(z.device.type):
        residual = residual.to(z.dtype)
    check_residual(residual, z.shape, z)
    return z.add_(residual) if inplace and type(residual) is type(z) is Tensor else z + residual


def is_summand(residual: Tensor, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether a residual has this shape, and the dtype and device of a convolution of ``x``."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if is_autocast_enabled(device_type) else x.dtype
    return residual.device == x.device and residual.dtype == dtype and residual.shape == shape


def _pad(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """Pads as far as (top, bottom, left, right) differ; the (height, width) that remains is returned too."""
    top, bottom, left, right = padding
    height, width = min(top, bottom), min(left, right)
    if top != bottom or left != right:
        x = F.pad(x, (left - width, right - width, top - height, bottom - height))
    return x, (height, width)


# Bytes from which on fresh memory costs more than a call with checks of its own.
_LARGE = 1 << 16


def is_plain_call() -> bool:
    """Whether nothing observes or transforms the operators that run now, so that any of them may run."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _overwritten_by_norm(z: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    """Whether batch norm is to take the memory of ``z``, by an operator that checks none of its arguments."""
    return (
        type(z) is Tensor
        and z.is_cpu
        and z.nbytes >= _LARGE
        and all(v is None or (v.is_cpu and v.dtype is z.dtype and v.shape == z.shape[1:2]) for v in vectors)
    )


def _batch_norm(z: Tensor, vectors: tuple[Any, ...], eps: float, inplace: bool) -> Tensor:
    """In eval mode; ``inplace`` on a CPU, where fresh memory costs more than the arithmetic."""
    weight, bias, mean, var = vectors
    if inplace and _overwritten_by_norm(z, vectors):
        unused = z.new_empty(0)
        torch.native_batch_norm(z, weight, bias, mean, var, False, 0.0, eps, out=(z, unused, unused))
        return z
    cudnn = z.is_cuda and torch.backends.cudnn.enabled
    return torch.batch_norm(z, weight, bias, mean, var, False, 0.0, eps, cudnn)


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    act_params: Sequence[float],
    residual: Tensor | None,
    residual_order: str,
) -> Tensor:
    """The operator's arguments, one PyTorch operation after another; differentiable.

    Shapes, dtypes and the formula are those of :func:`fused_cna.conv_norm_act`. PyTorch refuses what it
    refuses; only the residual is checked here, since an addition would broadcast it.
    """
    if len(padding) == 4:
        x, padding = _pad(x, padding)
    z = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    # Nothing else refers to z, and without autograd nothing needs its value later. A TorchScript trace is
    # taken with grad mode on and compared with one taken with it off, so both have to be the same.
    inplace = not torch.is_grad_enabled() and is_plain_call()
    if running_mean is not None:
        z = _batch_norm(z, (norm_weight, norm_bias, running_mean, running_var), eps, inplace)
    if residual is None:
        return activation.apply(z, act, act_params, inplace)
    if residual_order == "add_act":
        return activation.apply(add_residual(z, residual, inplace), act, act_params, inplace)
    check_residual_order(residual_order)
    return add_residual(activation.apply(z, act, act_params, inplace), residual, inplace)
