"""The tensor-core kernel on random inputs: its error against float64, by tile, split, layout and dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fused_cna
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, moved
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    FLOAT32_ERROR,
    Problem,
    Wanted,
    error_bound,
    expected_exactly,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import ConvShape, shape_named
from tests.simt import conv_norm_act
from tests.test_simt_implicit_gemm import LARGER, channels_last, tensor_core_plans

TF32_ROUNDOFF = 2.0**-11

TF32_ERROR = 0.9
"""c of the error bound for tf32, in its u: both operands rounded to nearest, sums and epilogue in float32.

A correctly rounded tf32 product of the problems here has 0.55 to 0.8 u, a truncated one 1.2 u and more.
"""

TILES = ("256x128", "128x256", "128x128", "256x64", "128x64", "128x32", "64x64")

# Only large outputs: the few of a small one may all happen to come from unlucky roundings.
SHAPES = (*(shape for shape in LARGER if shape.name != "filter_of_mask"), shape_named("many_chunks"))

Run = Callable[..., Tensor]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run_simulated(problem: Problem, plan: str = "implicit_gemm_sm80", seed: int = 0) -> Tensor:
    return problem.call(conv_norm_act, plan=plan, allow_tf32=True, seed=seed)


def run_on_gpu(problem: Problem, plan: str = "implicit_gemm_sm80", seed: int = 0) -> Tensor:
    """Runs the plan on the GPU, which orders its threads as it likes."""
    with fused_cna.forced_plan(plan), torch.inference_mode():
        return problem.map(lambda tensor: moved(tensor, "cuda")).call(fused_cna.conv_norm_act).cpu()


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a plan of the tensor-core kernel, simulated and real; float32 rounds to tf32, torch's default."""
    if request.param == "simt":
        yield run_simulated
        return
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    yield run_on_gpu


def bound(dtype: torch.dtype) -> float:
    return TF32_ERROR * TF32_ROUNDOFF if dtype == torch.float32 else error_bound(dtype)


def check(
    run: Run, problem: Problem, plan: str = "implicit_gemm_sm80", expected: Tensor | None = None
) -> None:
    actual = run(problem, plan)
    assert actual.dtype == problem.x.dtype
    error = relative_error(actual, expected_exactly(problem) if expected is None else expected)
    allowed = bound(problem.x.dtype)
    assert error <= allowed, f"{plan}: relative error {error:.3g} exceeds {allowed:.3g}"


def make(shape: ConvShape, dtype: torch.dtype, residual_order: str | None = "add_act") -> Problem:
    return channels_last(random_problem(shape, dtype, Wanted("relu", residual_order=residual_order)))


@dtypes
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_stays_within_the_bound(
    run: Run, shape: ConvShape, dtype: torch.dtype, residual_order: str | None
) -> None:
    problem = make(shape, dtype, residual_order)
    expected = expected_exactly(problem)
    plans = tensor_core_plans(problem)
    chance = random.Random(f"{shape} {dtype} {residual_order}")
    for plan in {plans[0], chance.choice(plans)}:
        check(run, problem, plan, expected)


@dtypes
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_and_split_stays_within_the_bound(run: Run, tile: str, dtype: torch.dtype) -> None:
    found = 0
    for shape in (SHAPES[0], SHAPES[2], SHAPES[4]):
        problem = make(shape, dtype, "act_add")
        expected = expected_exactly(problem)
        plans = [plan for plan in tensor_core_plans(problem) if f" {tile}x" in plan]
        # the plans of one kind differ in their splits alone; the first and the last are enough
        for kind in {_kind(plan) for plan in plans}:
            alike = [plan for plan in plans if _kind(plan) == kind]
            for plan in {min(alike, key=_split), max(alike, key=_split)}:
                check(run, problem, plan, expected)
                found += _split(plan) > 1
    assert found, f"{tile} was never split"


def _kind(plan: str) -> tuple[str, str]:
    return plan.split()[1], plan.split()[4]


def _split(plan: str) -> int:
    return int(plan.split()[3])


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_inputs_in_any_layout(run: Run, shape: ConvShape, layout: Layout, dtype: torch.dtype) -> None:
    problem = make(shape, dtype)
    assert problem.residual is not None
    check(run, problem.replace(x=layout(problem.x)))
    check(run, problem.replace(weight=layout(problem.weight)))
    check(run, problem.replace(residual=layout(problem.residual)))


@dtypes
def test_everything_in_nchw(run: Run, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(run, random_problem(shape, dtype, Wanted("silu", residual_order="act_add")))


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(run: Run, act: str, dtype: torch.dtype) -> None:
    """Of both rows of a turn, with channels dense and with pixels dense."""
    shape = ConvShape("tails", 1, 16, 9, 11, 44, 1, 1, "rows, columns and vectors that end within a tile")
    problem = random_problem(shape, dtype, Wanted(act, ACTIVATIONS[act], residual_order="act_add"))
    for each in (problem, channels_last(problem)):
        check(run, each.replace(x=each.x * 4))


@dtypes
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[-1]], ids=str)
def test_splits_repeat_bit_for_bit_in_any_order_of_blocks(
    run: Run, shape: ConvShape, dtype: torch.dtype
) -> None:
    problem = make(shape, dtype)
    by_split = {_split(plan): plan for plan in reversed(tensor_core_plans(problem))}
    assert len(by_split) > 1
    for plan in by_split.values():
        first = run(problem, plan)
        for seed in (1, 2, 3):
            assert torch.equal(bits(run(problem, plan, seed)), bits(first)), plan


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.int16)


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of fraction, to nearest, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated_to_tf32(tensor: Tensor) -> Tensor:
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tf32_rounds_operands_once_and_nothing_else(shape: ConvShape) -> None:
    """Simulated only: how tensor cores round their sums is not documented."""
    problem = make(shape, torch.float32)
    exact = expected_exactly(problem)
    rounded, truncated = (
        expected_exactly(problem.replace(x=to_tf32(problem.x), weight=to_tf32(problem.weight)))
        for to_tf32 in (rounded_to_tf32, truncated_to_tf32)
    )
    allowed = TF32_ERROR * TF32_ROUNDOFF
    assert relative_error(rounded, exact) <= allowed
    assert relative_error(truncated, exact) > allowed, "the bound would let truncation pass"
    for plan in {plans[0] for plans in (tensor_core_plans(problem), tensor_core_plans(problem)[::-1])}:
        error = relative_error(run_simulated(problem, plan), rounded) / unit_roundoff(torch.float32)
        assert error <= FLOAT32_ERROR, f"{plan}: {error:.2f} u from the product of rounded operands"
