"""Whether a network's output is another's: tensor by tensor, against a run in float64."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference import relative_error

# Eager is allowed no luck: where its own error is tiny, another order of the same sums may have more.
FLOOR = 4e-6


def named_leaves(value: Any, path: str = "output") -> dict[str, Tensor]:
    """Every tensor in nested mappings, sequences, dataclasses and objects that torchvision returns."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{path}.{part.name}", getattr(value, part.name)) for part in fields(value)]
    else:
        parts = []
    return {name: tensor for where, part in parts for name, tensor in named_leaves(part, where).items()}


def leaves(value: Any) -> list[Tensor]:
    """The tensors of `named_leaves`; one that is there twice, twice."""
    return list(named_leaves(value).values())


def error_bound(eager_error: float) -> float:
    """What a fused tensor may be off from float64, given what the original is off in float32."""
    return max(3 * eager_error, FLOOR)


def differences(
    fused: Mapping[str, Tensor], original: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[list[str], float]:
    """What is wrong with `fused`, in words, and its largest error as a fraction of its bound.

    Relative Frobenius errors from `exact`, the original in float64. Integers, such as labels, must be equal.
    """
    if list(fused) != list(original):
        return [f"returned {', '.join(fused)} instead of {', '.join(original)}"], float("inf")
    wrong, worst = [], 0.0
    for name, expected in original.items():
        actual = fused[name]
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            wrong.append(
                f"{name} is {actual.dtype} {tuple(actual.shape)} instead of "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
            continue
        if not expected.is_floating_point():
            if not torch.equal(actual, expected):
                wrong.append(f"{name}: {int((actual != expected).sum())} of {actual.numel()} integers differ")
            continue
        error, allowed = relative_error(actual, exact[name]), error_bound(eager_error(expected, exact[name]))
        worst = max(worst, error / allowed)
        if not error <= allowed:
            wrong.append(f"{name}: relative error {error:.3g} exceeds {allowed:.3g}")
    return wrong, worst


def eager_error(original: Tensor, exact: Tensor) -> float:
    return relative_error(original, exact)
