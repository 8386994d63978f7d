"""What is special to the kernel for few output pixels: the width of a team, and the rows of a tile."""

from __future__ import annotations

import pytest
import torch

from tests.conformance import Subject, random_case
from tests.conftest import Backend
from tests.families import BY_NAME, family_shape, laid_out
from tests.layouts import channels_last
from tests.reference import DTYPES, Wanted, integer_problem
from tests.shapes import ConvShape

SMALL_M = BY_NAME["small_m"]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def lanes(plan: str) -> int:
    return int(plan.split()[3])


def test_the_shapes_reach_every_width_of_a_team() -> None:
    plans = [
        plan
        for shape in SMALL_M.shapes
        for plan in SMALL_M.plans(integer_problem(shape, torch.float16), "H100")
    ]
    assert {lanes(plan) for plan in plans} == {1, 2, 4, 8, 16, 32, 64, 128}


@dtypes
@pytest.mark.parametrize("name", ["squeeze", "excite", "deep"])
def test_every_width_of_a_team_repeats_bit_for_bit(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    subject = Subject(kernels, SMALL_M, name, dtype)
    problem = random_case(family_shape("small_m", name), dtype, Wanted("silu"))
    by_lanes = {lanes(plan): plan for plan in subject.plans(problem)}
    assert len(by_lanes) > 2
    subject.check_repeats(problem, by_lanes.values())


@dtypes
@pytest.mark.parametrize("n", range(1, 18))
def test_any_number_of_rows_is_exact(kernels: Backend, n: int, dtype: torch.dtype) -> None:
    subject = Subject(kernels, SMALL_M, n, dtype)
    shape = ConvShape(f"batch_{n}", n, 40, 1, 1, 12, 1, 1, "rows of every tile, whole and not")
    problem = integer_problem(shape, dtype, Wanted(residual_order="add_act"))
    plans = sorted(subject.plans(problem), key=lanes)
    for ends in (plans, plans[::-1]):
        subject.check(problem, {SMALL_M.instantiation(plan): plan for plan in ends}.values())


def test_long_reductions_are_summed_in_chunks(kernels: Backend) -> None:
    """9,216 products by one warp and by four: one running sum would have several times the error."""
    subject = Subject(kernels, SMALL_M)
    shape = ConvShape("long", 2, 1024, 3, 3, 32, 3, 3, "a head over a 3x3 image")
    problem = laid_out(random_case(shape, torch.float32, Wanted()), channels_last)
    subject.check_error(problem, subject.plans(problem))
