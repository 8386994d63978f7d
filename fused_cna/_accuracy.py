"""How far a result may be from the exact one, and what the exact one is for tensors that are there."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_cna import eager

_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TF32_ROUNDOFF = 2.0**-11

# c of the bound max(1.05 x eager's error, c u); 16-bit types round once, float32's sums do many times.
_FLOAT32_CONSTANT = 5.0
_ROUNDED_ONCE = 1.02

# Where they are in the operator's arguments.
_X, _RESIDUAL = 0, 14

_IMAGES = 8  # compared at a time, in float64


def error_bound(dtype: torch.dtype, allow_tf32: bool, eager_error: float) -> float:
    """The relative error that every kernel keeps to, given that of the eager three-step on the same call."""
    if dtype == torch.float32:
        constant = _ROUNDED_ONCE * _TF32_ROUNDOFF if allow_tf32 else _FLOAT32_CONSTANT * _ROUNDOFF[dtype]
    else:
        constant = _ROUNDED_ONCE * _ROUNDOFF[dtype]
    return max(1.05 * eager_error, constant)


def errors(arguments: Sequence[Any], results: Sequence[Tensor]) -> list[float]:
    """The relative errors of results of an operator's call, against its formula in float64.

    Image by image, so that a large batch needs little memory.
    """
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    wide = [a.double() if i in tensors and i not in (_X, _RESIDUAL) else a for i, a in enumerate(arguments)]
    compared = [_Comparison() for _ in results]
    for index in range(arguments[_X].shape[0]):
        image = slice(index, index + 1)
        for i in {_X, _RESIDUAL}.intersection(tensors):
            wide[i] = arguments[i][image].double()
        exact = eager.conv_norm_act(*wide)
        for comparison, result in zip(compared, results, strict=True):
            comparison.add(result[image], exact)
    return [comparison.error() for comparison in compared]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The relative Frobenius error where ``exact`` is finite; infinite where only ``actual`` is not."""
    comparison = _Comparison()
    for part, exact_part in zip(actual.split(_IMAGES), exact.split(_IMAGES), strict=True):
        comparison.add(part, exact_part)
    return comparison.error()


class _Comparison:
    """Sums of squares over parts of a tensor."""

    def __init__(self) -> None:
        self._difference: Tensor | float = 0.0
        self._size: Tensor | float = 0.0

    def add(self, actual: Tensor, exact: Tensor) -> None:
        exact = exact.double()
        # What is near the dtype's largest number may round to infinity.
        fits = exact.abs() < 0.99 * torch.finfo(actual.dtype).max
        self._difference = self._difference + torch.where(fits, actual.double() - exact, 0.0).square().sum()
        self._size = self._size + torch.where(fits, exact, 0.0).square().sum()

    def error(self) -> float:
        difference, size = math.sqrt(self._difference), math.sqrt(self._size)
        if difference == 0.0:
            return 0.0
        return math.inf if size == 0.0 or math.isnan(difference) else difference / size
