"""The operator as a function: :func:`conv_norm_act`.

It runs plain PyTorch on every device but CUDA ones, which costs less per call than the operator does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_cna import ops
from fused_cna._checks import check_dimensions, explicit_padding, pair, unsqueeze


def _check_tensors(required: dict[str, object], optional: dict[str, object]) -> None:
    for name, value in (*required.items(), *optional.items()):
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            allowed = "a Tensor or None" if name in optional else "a Tensor"
            raise TypeError(f"conv_norm_act(): {name} must be {allowed}, but got {type(value).__name__}")


def _check_options(act: object, act_params: object, groups: object) -> None:
    if not isinstance(act, str):
        raise TypeError(f"act must be the name of an activation, such as 'relu', but got {act!r}")
    if not isinstance(act_params, (tuple, list)):
        raise TypeError(f"act_params must be a sequence of numbers, such as (0.1,), but got {act_params!r}")
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an int, but got {groups!r}")


def _node_of(arguments: dict[str, Any]) -> Any:
    """A call of :func:`conv_norm_act` as FX records it, also when it reads a pickled graph module back."""
    x, weight, bias, *options = arguments
    first = tuple(arguments[name] for name in (x, weight, bias))
    rest = {name: arguments[name] for name in options}
    return first[0].tracer.create_proxy("call_function", conv_norm_act, first, rest)


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "identity",
    act_params: Sequence[float] = (),
    residual: Tensor | None = None,
    residual_order: str = "add_act",
    out: Tensor | None = None,
) -> Tensor:
    """Convolution, batch norm in eval mode, residual and activation; on a GPU as one kernel.

    Equivalent to::

        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if running_mean is not None:
            z = F.batch_norm(z, running_mean, running_var, norm_weight, norm_bias, eps=eps)
        if residual is not None and residual_order == "add_act":
            z = z + residual
        y = ACT(z)
        if residual is not None and residual_order == "act_add":
            y = y + residual

    On a GPU everything after the loads is computed in float32 and rounded once, at the store. Where a
    gradient is wanted it is eager and differentiable in every tensor. Under autocast ``x``, ``weight``,
    ``bias`` and ``residual`` are cast, on every call, and the norm vectors are not.

    It is eager as well, with one :class:`FusionFallbackWarning` per cause, on CUDA tensors of another dtype
    than float32, float16 and bfloat16, on GPUs below compute capability 8.0, and without the compiled
    extension.

    Args:
        x: [N, C, H, W], or [C, H, W] for a batch of one without its dimension; any strides.
        weight: [K, C / groups, R, S], the dtype of ``x``; any strides.
        bias: [K], the dtype of ``x``.
        norm_weight: [K]; None for 1.
        norm_bias: [K]; None for 0.
        running_mean: [K]; None, together with ``running_var``, for no norm. The norm vectors given are all
            float32 or all of the dtype of ``x``.
        running_var: [K].
        eps: added to the variance.
        stride: in input pixels, one number or (height, width).
        padding: zeros around the input: one number, (height, width), (top, bottom, left, right), "valid" for
            none, or "same" for as many as keep the size, the odd one at the bottom and right.
        dilation: in input pixels, one number or (height, width).
        groups: divides C and K.
        act: "identity", "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish",
            "hardsigmoid", "sigmoid", "tanh" or "mish".
        act_params: (negative_slope,) for "leaky_relu", (alpha,) for "elu", else empty.
        residual: the shape and dtype of the result; not broadcast.
        residual_order: "add_act" for ``act(z + residual)``, "act_add" for ``act(z) + residual``.
        out: where to write the result, such as the channel slice ``big[:, a:b]`` of a larger tensor: its
            shape and dtype, any strides. It may lie between the elements of ``x``, as another slice of the
            same tensor does, but share none with an input; ``residual`` alone may be ``out`` itself. Not
            where a gradient is wanted.

    Returns:
        ``out`` where it is given. Else [N, K, P, Q], or [K, P, Q] for an input without batch dimension, in
        the dtype of ``x``, which under autocast is that of autocast. In channels_last where ``F.conv2d``
        would return it so: where ``x`` or ``weight`` is.

    Raises:
        RuntimeError: whatever ``F.conv2d`` refuses; norm vectors, a residual, an activation, a residual
            order or an ``out`` that do not fit; ``out`` where a gradient is wanted; and with
            ``fused_cna.config.strict`` any CUDA call that cannot be fused.
        TypeError: something else than a tensor where one is due, or a size that is no integer.
    """
    if isinstance(x, torch.fx.Proxy):
        return _node_of(locals())  # type: ignore[no-any-return]
    _check_tensors(
        {"x": x, "weight": weight},
        {
            "bias": bias,
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "running_mean": running_mean,
            "running_var": running_var,
            "residual": residual,
            "out": out,
        },
    )
    _check_options(act, act_params, groups)
    batch_out, unbatched = out, x.dim() == 3
    if unbatched:
        x, residual, batch_out = unsqueeze(x, residual, out)
    check_dimensions(x, weight)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    padding = explicit_padding(padding, weight.shape[2:], stride, dilation)
    arguments = (
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        eps,
        stride,
        padding,
        dilation,
        groups,
        act,
        act_params,
        residual,
        residual_order,
    )
    kernel = ops.takes_kernel(x)
    if out is not None and batch_out is not None:
        ops.write_into(batch_out, arguments, kernel=kernel)
        return out
    y = ops.operator(*arguments) if kernel else ops.compute_eagerly(arguments)
    return y.squeeze(0) if unbatched else y
