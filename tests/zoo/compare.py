"""Whether a network's output is another's: tensor by tensor, against a run in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.reference import relative_error

Tensors = Mapping[str, Tensor]

# A fused tensor may be three times as far from float64 as the original in float32. Eager is allowed no luck:
# where its own error is tiny, another order of the same sums may have more.
FLOOR = 4e-6


def named_leaves(value: Any, path: str = "output") -> dict[str, Tensor]:
    """Every tensor in nested containers."""
    found, _ = tree_flatten_with_path(value)
    return {path + keystr(where): leaf for where, leaf in found if isinstance(leaf, Tensor)}


@dataclass
class Verdict:
    """How a fused network's results compare with the original's."""

    wrong: list[str]
    """What is wrong, in words; empty where nothing is."""
    worst: float
    """The largest error as a fraction of its bound."""


def compare(fused: Tensors, original: Tensors, exact: Tensors) -> Verdict:
    """Relative Frobenius errors from `exact`, the original in float64; integers, such as labels, are equal.

    Where `exact` has another shape, since a box more passed a threshold, the original itself is the measure.
    """
    if list(fused) != list(original):
        return Verdict([f"it returned {', '.join(fused)} instead of {', '.join(original)}"], math.inf)
    verdict = Verdict([], 0.0)
    for name, expected in original.items():
        actual, best = fused[name], exact[name]
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            verdict.wrong.append(
                f"{name} is {actual.dtype} {tuple(actual.shape)} instead of "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        elif not expected.is_floating_point():
            if not torch.equal(actual, expected):
                different = int((actual != expected).sum())
                verdict.wrong.append(f"{name}: {different} of {actual.numel()} integers differ")
        else:
            best = best if best.shape == expected.shape else expected
            error, allowed = relative_error(actual, best), max(3 * relative_error(expected, best), FLOOR)
            verdict.worst = max(verdict.worst, error / allowed)
            if not error <= allowed:
                verdict.wrong.append(f"{name}: relative error {error:.2g} exceeds {allowed:.2g}")
    if verdict.wrong:
        verdict.worst = max(verdict.worst, 1.0)
    return verdict
