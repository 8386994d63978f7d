"""What is special to the depthwise kernels: rounds of blocks, strips of tiles, and sums by the formula."""

from __future__ import annotations

import math

import pytest
import torch

from fused_cna import ConvProblem, explain
from tests.conformance import Subject, random_case, without_zeros
from tests.conftest import Backend
from tests.families import BY_NAME, HALVES, family_shape, laid_out
from tests.layouts import channel_slice, channels_last
from tests.reference import Problem, Wanted, expected_exactly, expected_rounded, integer_problem
from tests.shapes import ConvShape, table
from tests.simt import conv_norm_act

TOEPLITZ = BY_NAME["depthwise_toeplitz"]

dtypes = pytest.mark.parametrize("dtype", HALVES, ids=str)

ROUNDS = table("""
rounds     | 7x64x56x56 64x3x3 pad 1, groups 64 | more blocks than a small device runs
rounds_9x9 | 5x64x56x56 64x9x9 pad 4, groups 64 | weights anew in every round
""")


@pytest.mark.parametrize("shape", ROUNDS, ids=str)
def test_blocks_take_several_rounds(shape: ConvShape) -> None:
    problem = laid_out(integer_problem(shape, torch.float16), channels_last)
    chosen = BY_NAME["depthwise"].plans(problem, "L4")[0]
    described = ConvProblem(*shape.x_size, shape.k, shape.r, shape.s, padding=shape.r // 2, groups=shape.c)
    plan = next(c for c in explain(described, device="L4").candidates if c["name"] == chosen)
    pixels, channels, _ = plan["tile"]
    strips = shape.n * shape.p * -(-shape.q // 7)
    assert plan["blocks"] * (pixels // 7) < strips * -(-shape.k // channels), "one round is enough"
    assert torch.equal(problem.call(conv_norm_act, plan=chosen, device="L4"), expected_rounded(problem))


def test_the_shapes_reach_every_number_of_strips_across_and_down() -> None:
    tiles = {
        tuple(map(int, plan.split()[3].split("x")))
        for shape in TOEPLITZ.shapes
        for plan in TOEPLITZ.plans(laid_out(integer_problem(shape, torch.float16), channels_last), "H100")
    }
    assert {across for _, _, across in tiles} == set(range(1, 17))
    assert {down for _, down, _ in tiles} >= {1, 2, 3, 4, 5, 8, 13, 16}
    assert {images for images, _, _ in tiles} >= {1, 2, 3, 5}
    assert all(images * down * across <= 16 for images, down, across in tiles)


@dtypes
@pytest.mark.parametrize("s", range(2, 10))
def test_every_filter_width_of_toeplitz_is_within_the_error_bound(
    kernels: Backend, s: int, dtype: torch.dtype
) -> None:
    subject = Subject(kernels, TOEPLITZ, s, dtype)
    for r in (1, s, 11 - s):
        pads = (r // 2, (r - 1) // 2, s // 2, s // 3)
        shape = ConvShape("any", 2, 18, 11, 19, 18, r, s, "S in 2..9", padding=pads, groups=18)
        problem = random_case(shape, dtype, Wanted("relu", residual_order="add_act"))
        problem = laid_out(problem, channels_last)
        subject.check_error(problem, subject.one_of_each(problem))


def test_slices_of_channels_are_read_where_they_lie(kernels: Backend) -> None:
    subject = Subject(kernels, TOEPLITZ)
    problem = integer_problem(family_shape("depthwise_toeplitz", "efficientnet_7"), torch.float16)
    for before, behind, access in ((8, 8, "16-byte"), (4, 8, "4-byte"), (2, 0, "4-byte")):
        given = problem.replace(x=channel_slice(problem.x, before, behind))
        plan = subject.plans(given)[0]
        assert plan.endswith(access)
        subject.check(given, [plan])


def with_value(name: str, dtype: torch.dtype, value: float, at: tuple[int, int]) -> Problem:
    """Integers with `value` in a pixel of one channel, and no weight that is zero."""
    shape = family_shape("depthwise_toeplitz", name)
    problem = laid_out(integer_problem(shape, dtype), channels_last)
    problem.x[-1, shape.c // 2, at[0], at[1]] = value
    return problem.replace(weight=without_zeros(problem.weight))


@dtypes
@pytest.mark.parametrize("at", [(0, 0), (5, 8), (7, 43), (10, 22), (17, 31), (16, 32), (20, 44)], ids=str)
def test_infinities_by_the_borders_of_strips_and_tiles(
    kernels: Backend, at: tuple[int, int], dtype: torch.dtype
) -> None:
    subject = Subject(kernels, TOEPLITZ, at)
    for value in (math.inf, -math.inf, math.nan):
        problem = with_value("over_a_tile", dtype, value, at)
        subject.check_not_finite(problem, subject.one_of_each(problem))


@dtypes
def test_infinities_of_both_signs_meet_as_in_the_formula(kernels: Backend, dtype: torch.dtype) -> None:
    subject = Subject(kernels, TOEPLITZ)
    problem = with_value("over_a_tile", dtype, math.inf, (9, 20))
    problem.x[-1, 8, 12, 17] = -math.inf
    expected = subject.check_not_finite(problem, subject.plans(problem))
    assert expected.isnan().any()
    assert expected.isinf().any()


def test_sanitizers_accept_the_sum_by_the_formula() -> None:
    problem = with_value("filter_9x9", torch.float16, math.inf, (6, 6))
    actual = problem.call(conv_norm_act, plan="depthwise_toeplitz", sanitized=True)
    assert torch.equal(actual.isfinite(), expected_exactly(problem).isfinite())
