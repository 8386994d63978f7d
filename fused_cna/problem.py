"""A convolution as the planner is asked about it: :class:`ConvProblem`, or the tensors of a call."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fused_cna._checks import RESIDUAL_ORDERS, explicit_padding, pair
from fused_cna.activation import ACTIVATIONS


@dataclass(frozen=True)
class ConvProblem:
    """One convolution, without tensors. Ints stand for pairs where ``nn.Conv2d`` takes both.

    Args:
        n, c, h, w: size of the input.
        k, r, s: output channels, filter height, filter width.
        stride, dilation: in input pixels, one number or (height, width).
        padding: one number, (height, width), (top, bottom, left, right), "same" or "valid".
        groups: divides c and k.
        dtype: of input and weight.
        channels_last: whether both are dense channels_last; else dense contiguous.
        norm, act, residual: what follows the convolution: whether a batch norm, the name of the activation,
            and the residual's order or None. Only plans that were measured depend on it.

    Raises:
        TypeError: a number that is no int, or a ``dtype`` that is no torch.dtype.
        ValueError: a size, stride or dilation that is not positive, a negative padding, ``groups`` that does
            not divide the channels, a filter larger than the padded input, or an unknown activation or
            residual order.
        RuntimeError: a stride, dilation or padding with the wrong number of values, or "same" with a stride.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int | Sequence[int] = 1
    padding: int | str | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    dtype: torch.dtype = torch.float16
    channels_last: bool = True
    norm: bool = True
    act: str = "relu"
    residual: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "c", "h", "w", "k", "r", "s", "groups"):
            if not isinstance(getattr(self, name), Integral):
                raise TypeError(f"{name} must be an int, but got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, but got {self.dtype!r}")
        stride, padding, dilation = self._geometry()
        for name, values, least in (
            ("stride", stride, 1),
            ("dilation", dilation, 1),
            ("padding", padding, 0),
        ):
            if min(values) < least:
                raise ValueError(f"{name} must be at least {least}, but got {getattr(self, name)}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(
                f"groups must divide c and k, but got groups={self.groups}, c={self.c}, k={self.k}"
            )
        for name, known in (("act", tuple(ACTIVATIONS)), ("residual", (None, *RESIDUAL_ORDERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, but got {getattr(self, name)!r}")
        top, bottom, left, right = padding
        for size, pads, i in ((self.h, top + bottom, 0), (self.w, left + right, 1)):
            extent = dilation[i] * ((self.r, self.s)[i] - 1) + 1
            if extent > size + pads:
                raise ValueError(
                    f"the filter must fit the padded input, but it spans {extent} pixels of {size + pads} "
                    f"in {self}"
                )

    def _geometry(self) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, int]]:
        """Stride, the four pads, and dilation."""
        stride, dilation = pair(self.stride, "stride"), pair(self.dilation, "dilation")
        return stride, four_pads(explicit_padding(self.padding, (self.r, self.s), stride, dilation)), dilation

    def question(self, x: Tensor | None = None) -> dict[str, Any]:
        """The problem as the planner takes it. Without ``x`` both operands lie as ``channels_last`` says."""

        def placed(*size: int) -> Tensor:
            memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
            return torch.empty(size, dtype=self.dtype, device="meta", memory_format=memory_format)

        stride, padding, dilation = self._geometry()
        return call_question(
            placed(self.n, self.c, self.h, self.w) if x is None else x,
            placed(self.k, self.c // self.groups, self.r, self.s),
            *(stride, padding, dilation, self.groups),
            norm=self.norm,
            act=self.act,
            residual=self.residual,
        )


def allows_tf32() -> bool:
    """Whether float32 convolutions on a GPU may be computed in tf32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def four_pads(padding: Sequence[int]) -> tuple[int, ...]:
    return tuple(padding) if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def call_question(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    norm: bool,
    act: str,
    residual: str | None,
) -> dict[str, Any]:
    """The problem of an operator's call as the planner takes it, x and the weight as they lie in memory."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    sizes = {"n": n, "c": c, "h": h, "w": w, "k": k, "r": r, "s": s, "groups": groups}
    return {
        **sizes,
        "stride": tuple(stride),
        "padding": four_pads(padding),
        "dilation": tuple(dilation),
        "dtype": str(x.dtype).removeprefix("torch."),
        "allow_tf32": allows_tf32(),
        "x_address": 0 if x.is_meta else x.data_ptr(),
        "x_strides": x.stride(),
        "weight_address": 0 if weight.is_meta else weight.data_ptr(),
        "weight_strides": weight.stride(),
        "norm": norm,
        "act": act,
        "residual": residual,
    }
