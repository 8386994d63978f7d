"""What is special to the kernel of narrow groups: where the taps of a filter may lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conformance import Subject
from tests.conftest import Backend
from tests.families import BY_NAME, family_shape, laid_out
from tests.layouts import channels_last
from tests.reference import DTYPES, expected_rounded, integer_problem

GROUPED = BY_NAME["grouped"]


def spread(weight: Tensor) -> Tensor:
    """The same weight as some taps of larger filters: dense channels, and gaps between the taps."""
    k, c, r, s = weight.shape
    larger = torch.full((k, r + 2, 2 * s, c), float("nan"), dtype=weight.dtype).permute(0, 3, 1, 2)
    larger[:, :, 1:-1, ::2] = weight
    return larger[:, :, 1:-1, ::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["of_8", "of_4", "dilated", "tall", "long_row", "pointwise"])
def test_the_taps_of_a_filter_may_lie_apart(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    subject = Subject(kernels, GROUPED, name, dtype)
    problem = laid_out(integer_problem(family_shape("grouped", name), dtype), channels_last)
    given = problem.replace(weight=spread(problem.weight))
    plans = subject.one_of_each(given)
    assert not any("copy" in plan for plan in plans)
    subject.check(given, plans, expected_rounded(problem))
