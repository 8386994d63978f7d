"""Convolution, batch norm, residual and activation in plain PyTorch: the fallback."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_cna import activation
from fused_cna._checks import check_residual, check_residual_order


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; those that have none, such as meta, refuse to be asked."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def add_residual(z: Tensor, residual: Tensor) -> Tensor:
    """``z + residual`` without broadcasting or type promotion; under autocast the residual is cast.

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
    return z + residual


def _pad(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """Pads as far as (top, bottom, left, right) differ; the (height, width) that remains is returned too."""
    top, bottom, left, right = padding
    height, width = min(top, bottom), min(left, right)
    if top != bottom or left != right:
        x = F.pad(x, (left - width, right - width, top - height, bottom - height))
    return x, (height, width)


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
    if running_mean is not None:
        cudnn = z.is_cuda and torch.backends.cudnn.enabled
        z = torch.batch_norm(z, norm_weight, norm_bias, running_mean, running_var, False, 0.0, eps, cudnn)
    # Nothing else refers to z, and without autograd nothing needs its value later. A TorchScript trace is
    # taken with grad mode on and compared with one taken with it off, so both have to be the same.
    inplace = not torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    if residual is None:
        return activation.apply(z, act, act_params, inplace)
    if residual_order == "add_act":
        return activation.apply(add_residual(z, residual), act, act_params, inplace)
    check_residual_order(residual_order)
    return add_residual(activation.apply(z, act, act_params, inplace), residual)
