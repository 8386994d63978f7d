"""The tensor-core kernel, simulated: every tile, kind of rows, width of access and split, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from tests.plans import plan_names
from tests.reference import DTYPES, Problem, Wanted, expected_rounded, integer_problem
from tests.shapes import SHAPES, ConvShape, shape_named
from tests.simt import conv_norm_act

# Larger than one tile in every direction, each for one more property of the main loop.
LARGER = (
    ConvShape("layer_14x14", 1, 64, 14, 14, 64, 3, 3, "a middle layer of ResNet", padding=(1, 1)),
    ConvShape("strided", 1, 160, 9, 9, 136, 3, 3, "K over two tiles, C with a tail", (2, 2), (1, 1)),
    ConvShape("pointwise", 3, 96, 11, 9, 264, 1, 1, "a plain matrix product over several images"),
    ConvShape("two_groups", 2, 64, 9, 9, 160, 3, 3, "groups of 32 to 80 channels", padding=(1, 1), groups=2),
    ConvShape("deep_pointwise", 2, 320, 4, 4, 80, 1, 1, "few pixels and many channels: splits"),
    ConvShape(
        "filter_of_mask", 1, 8, 33, 9, 16, 32, 2, "as many rows of taps as a mask takes", padding=(1, 0)
    ),
    ConvShape(
        "filter_over_mask", 1, 8, 34, 9, 16, 33, 2, "more rows of taps than a mask takes", padding=(2, 1)
    ),
    ConvShape("accesses_of_8", 1, 36, 14, 13, 68, 3, 3, "channels mod 4, dilated", (1, 2), (4, 3), (3, 2)),
    ConvShape("accesses_of_4", 2, 22, 9, 13, 70, 3, 2, "channels mod 2", padding=(1, 0)),
)

ALL = (*LARGER, *(shape for shape in SHAPES if shape.n > 0))


def channels_last(problem: Problem) -> Problem:
    return problem.replace(
        x=problem.x.contiguous(memory_format=torch.channels_last),
        weight=problem.weight.contiguous(memory_format=torch.channels_last),
    )


def tensor_core_plans(problem: Problem) -> list[str]:
    return plan_names(problem, "implicit_gemm_sm80", allow_tf32=True)


def sample(plans: list[str], chance: random.Random) -> list[str]:
    return chance.sample(plans, min(2, len(plans)))


def without_split(plan: str) -> str:
    """The instantiation that a plan runs: its tile, rows and access."""
    kernel, tile, _, _, *rest = plan.split()
    return " ".join((kernel, tile, *rest))


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "add_act")))
    problem = integer_problem(shape, dtype, wanted)
    expected = expected_rounded(problem)
    for given in (channels_last(problem), problem):
        plans = tensor_core_plans(given)
        narrow_tile = [plan for plan in plans if " 64x64x" in plan]
        for plan in {*sample(plans, chance), *sample(narrow_tile, chance)}:
            result = given.call(conv_norm_act, plan=plan, allow_tf32=True, seed=chance.randrange(1000))
            assert torch.equal(result, expected), plan


@pytest.mark.parametrize("shape", LARGER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instantiation_is_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    problem = channels_last(integer_problem(shape, dtype))
    expected = expected_rounded(problem)
    one_each = {without_split(plan): plan for plan in tensor_core_plans(problem)}
    assert one_each
    for plan in one_each.values():
        assert torch.equal(problem.call(conv_norm_act, plan=plan, allow_tf32=True), expected), plan


def test_the_larger_shapes_reach_every_instantiation() -> None:
    reached = {
        without_split(plan)
        for shape in LARGER
        for plan in tensor_core_plans(channels_last(integer_problem(shape, torch.float16)))
    }
    for tile in ("256x128x32", "128x256x32", "128x128x32", "128x128x64", "256x64x32", "64x64x64"):
        assert {f"implicit_gemm_sm80 {tile} {rows} 16-byte" for rows in ("masked", "pointwise")} <= reached
    for tile in ("128x64x32", "128x32x32", "64x64x32"):
        accesses = {f"implicit_gemm_sm80 {tile} masked {access}-byte" for access in (16, 8, 4)}
        assert accesses | {f"implicit_gemm_sm80 {tile} pointwise 16-byte"} <= reached
    assert "implicit_gemm_sm80 64x64x32 plain 4-byte" in reached


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_split_is_exact_in_any_order_of_blocks(dtype: torch.dtype) -> None:
    problem = channels_last(integer_problem(shape_named("many_chunks"), dtype))
    expected = expected_rounded(problem)
    splits = [plan for plan in tensor_core_plans(problem) if " 64x64x" in plan and "masked" in plan]
    assert len(splits) > 3
    for seed, plan in enumerate(splits):
        assert torch.equal(problem.call(conv_norm_act, plan=plan, allow_tf32=True, seed=seed), expected), plan


@pytest.mark.parametrize("shape", [shape for shape in ALL if shape.c // shape.groups % 2 == 0][::2], ids=str)
def test_sanitizers_accept_it(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted(residual_order="act_add"))
    given = chance.choice((problem, channels_last(problem)))
    plan = chance.choice(
        [plan for plan in tensor_core_plans(given) if " 64x64x" in plan or " 128x32x" in plan]
    )
    result = given.call(conv_norm_act, plan=plan, allow_tf32=True, sanitized=True)
    assert torch.equal(result, expected_rounded(problem))


@pytest.mark.parametrize("shape", [shape for shape in LARGER if shape.r > 30], ids=str)
def test_sanitizers_accept_a_mask_with_every_bit(shape: ConvShape) -> None:
    problem = channels_last(integer_problem(shape, torch.float16))
    plans = [plan for plan in tensor_core_plans(problem) if " 64x64x32 split 1 " in plan]
    assert plans
    for plan in plans:
        result = problem.call(conv_norm_act, plan=plan, sanitized=True)
        assert torch.equal(result, expected_rounded(problem)), plan
