"""Strict float32, simulated: the CUDA-core kernel, the compensated one, and which of them the plan takes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_cna import ConvProblem, explain
from tests.layouts import LAYOUTS, Layout
from tests.plans import plan_names
from tests.reference import (
    FLOAT32_ERROR,
    Wanted,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import SHAPES, ConvShape, shape_named
from tests.simt import conv_norm_act, list_plans
from tests.test_simt_implicit_gemm import LARGER, channels_last, without_split

KERNELS = ("implicit_gemm_fp32", "implicit_gemm_tf32x3")
UNIT = unit_roundoff(torch.float32)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@every_kernel
@pytest.mark.parametrize("shape", [*LARGER, *(shape for shape in SHAPES if shape.n > 0)], ids=str)
def test_integers_are_exact(shape: ConvShape, kernel: str) -> None:
    chance = random.Random(f"{shape} {kernel}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "act_add")))
    problem = integer_problem(shape, torch.float32, wanted)
    expected = expected_rounded(problem)
    for given in (channels_last(problem), problem):
        plans = plan_names(given, kernel)
        if shape.reduction >= 64:
            assert plans
        for plan in chance.sample(plans, min(2, len(plans))):
            result = given.call(conv_norm_act, plan=plan, seed=chance.randrange(1000))
            assert torch.equal(result, expected), plan


@every_kernel
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_every_instantiation_is_exact(shape: ConvShape, kernel: str) -> None:
    problem = channels_last(integer_problem(shape, torch.float32, Wanted(residual_order="add_act")))
    expected = expected_rounded(problem)
    one_each = {without_split(plan): plan for plan in plan_names(problem, kernel)}
    assert one_each
    for plan in one_each.values():
        assert torch.equal(problem.call(conv_norm_act, plan=plan), expected), plan


def test_the_larger_shapes_reach_every_instantiation() -> None:
    # 9 and 5 channels leave accesses of 4 bytes to float32
    odd = (
        shape_named("odd_channels"),
        ConvShape("odd", 1, 9, 12, 12, 40, 3, 3, "9 channels", padding=(1, 1)),
    )
    reached = {
        without_split(plan)
        for shape in (*LARGER, *odd)
        for kernel in KERNELS
        for plan in plan_names(channels_last(integer_problem(shape, torch.float32)), kernel)
    }
    tiles = {
        "implicit_gemm_fp32": ("128x128x16", "128x64x16", "128x32x16", "64x64x16"),
        "implicit_gemm_tf32x3": ("192x64x16", "96x64x16", "128x32x16", "64x64x16"),
    }
    for kernel in KERNELS:
        for tile in tiles[kernel]:
            assert {f"{kernel} {tile} {rows} 16-byte" for rows in ("masked", "pointwise")} <= reached
        for tile in tiles[kernel][2:]:
            assert {f"{kernel} {tile} masked {access}-byte" for access in (8, 4)} <= reached
        assert f"{kernel} {tiles[kernel][3]} plain 4-byte" in reached


@every_kernel
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("shape", [*LARGER, shape_named("many_chunks")], ids=str)
def test_the_error_stays_within_the_bound(shape: ConvShape, residual_order: str | None, kernel: str) -> None:
    wanted = Wanted("silu", residual_order=residual_order)
    problem = channels_last(random_problem(shape, torch.float32, wanted))
    expected = expected_exactly(problem)
    plans = plan_names(problem, kernel)
    chance = random.Random(f"{shape} {residual_order} {kernel}")
    for plan in {plans[0], chance.choice(plans)}:
        error = relative_error(problem.call(conv_norm_act, plan=plan), expected)
        assert error <= FLOAT32_ERROR * UNIT, f"{plan}: {error / UNIT:.2f} u"


@every_kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_inputs_in_any_layout(layout: Layout, kernel: str) -> None:
    problem = channels_last(integer_problem(LARGER[0], torch.float32, Wanted(residual_order="add_act")))
    assert problem.residual is not None
    for given in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(residual=layout(problem.residual)),
    ):
        assert torch.equal(given.call(conv_norm_act, plan=kernel), expected_rounded(given))


@every_kernel
@pytest.mark.parametrize("shape", [LARGER[0], LARGER[1], LARGER[7]], ids=str)
def test_sanitizers_accept_it(shape: ConvShape, kernel: str) -> None:
    problem = channels_last(integer_problem(shape, torch.float32))
    plans = [plan for plan in plan_names(problem, kernel) if " 64x64x" in plan or " 128x32x" in plan]
    for plan in {plans[0], plans[-1]}:
        result = problem.call(conv_norm_act, plan=plan, sanitized=True)
        assert torch.equal(result, expected_rounded(problem)), plan


@every_kernel
def test_splits_repeat_bit_for_bit_in_any_order_of_blocks(kernel: str) -> None:
    problem = channels_last(random_problem(LARGER[4], torch.float32))
    by_split = {plan.split()[3]: plan for plan in plan_names(problem, kernel)}
    assert len(by_split) > 1
    for plan in by_split.values():
        first = problem.call(conv_norm_act, plan=plan, seed=0)
        for seed in (1, 2):
            assert torch.equal(problem.call(conv_norm_act, plan=plan, seed=seed), first), plan


def column(c: int, r: int, generator: torch.Generator, positive: bool) -> tuple[Tensor, Tensor]:
    """A convolution of r x c products for each of 64 x 64 outputs."""
    x, w = (torch.randn(size, generator=generator) for size in ((1, c, r, 64), (64, c, r, 1)))
    x, w = (x.abs(), w.abs()) if positive else (x, w)
    return x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)


def running_sum(x: Tensor, w: Tensor) -> Tensor:
    """The same in plain float32: fused multiply-adds into one running sum, in the order of memory."""
    left = x[0].permute(2, 1, 0).reshape(64, -1).double()
    right = w.permute(0, 2, 1, 3).reshape(64, -1).double()
    total = torch.zeros(64, 64)
    for i in range(left.shape[1]):
        total = torch.addcmul(total.double(), left[:, i : i + 1], right[:, i][None]).float()
    return total.T.reshape(1, 64, 1, 64)


@pytest.mark.parametrize("positive", [False, True], ids=["both signs", "one sign"])
@pytest.mark.parametrize(("c", "r"), [(64, 1), (128, 1), (64, 9), (256, 9)])
def test_compensated_products_are_as_accurate_as_a_plain_float32_sum(c: int, r: int, positive: bool) -> None:
    """From 64 products on, where the plan begins to take them; docs/accuracy.md has the numbers."""
    x, w = column(c, r, torch.Generator().manual_seed(c), positive)
    exact = torch.nn.functional.conv2d(x.double(), w.double())
    plan = next(
        p for p in list_plans(x, w) if p.startswith("implicit_gemm_tf32x3 64x64") and " split 1 " in p
    )
    compensated = relative_error(conv_norm_act(x, w, plan=plan), exact)
    assert compensated <= relative_error(running_sum(x, w), exact)
    assert compensated > 0.1 * UNIT, "an exact result would mean that another kernel ran"


def test_the_compensation_is_what_makes_it_accurate() -> None:
    x, w = column(128, 1, torch.Generator().manual_seed(0), False)
    exact = torch.nn.functional.conv2d(x.double(), w.double())
    rounded = conv_norm_act(x, w, plan="implicit_gemm_sm80", allow_tf32=True)
    assert relative_error(rounded, exact) > 1000 * UNIT


def extremes(kernel: str, value: float, weight: float) -> Tensor:
    """64 products, one of them value x weight, the others 1 x 1."""
    x, w = torch.ones(1, 64, 1, 1), torch.ones(8, 64, 1, 1)
    x[0, 7], w[:, 7] = value, weight
    return conv_norm_act(x, w, plan=kernel).unique()


@every_kernel
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("weight", [2.0, -0.5, 1e-30, 300.0])
def test_infinities_stay_infinities(kernel: str, value: float, weight: float) -> None:
    assert extremes(kernel, value, weight).tolist() == [value * weight]
    assert extremes(kernel, weight, value).tolist() == [value * weight]


@every_kernel
def test_what_is_no_number_stays_none(kernel: str) -> None:
    for pattern in (0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1):
        nan = torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item()
        assert extremes(kernel, nan, 1.0).isnan().all()
        assert extremes(kernel, 1.0, nan).isnan().all()
    assert extremes(kernel, math.inf, 0.0).isnan().all()


@every_kernel
def test_large_and_small_values_keep_their_accuracy(kernel: str) -> None:
    for value, weight in ((2.0**127, 2.0**-100), (1.0000001e38, 0.5), (2.0**-120, 2.0**100), (3.0e-30, 7.0)):
        expected = 63 + float(torch.tensor(value)) * float(torch.tensor(weight))
        (actual,) = extremes(kernel, value, weight).tolist()
        assert actual == pytest.approx(expected, rel=1e-6)


@every_kernel
def test_what_is_not_finite_reaches_its_own_outputs_alone_through_splits_too(kernel: str) -> None:
    problem = channels_last(integer_problem(LARGER[1], torch.float32, Wanted(norm="none")))
    x = problem.x.clone()
    x[0, 150, 4, 3], x[0, 3, 8, 8] = math.inf, math.nan
    problem = problem.replace(x=x)
    expected = torch.nn.functional.conv2d(
        x, problem.weight, problem.bias, problem.stride, problem.padding, problem.dilation, problem.groups
    )
    assert all(kind(expected).any() for kind in (torch.isinf, torch.isnan, torch.isfinite))
    by_split = {plan.split()[3]: plan for plan in plan_names(problem, kernel)}
    assert len(by_split) > 1
    for plan in by_split.values():
        actual = problem.call(conv_norm_act, plan=plan)
        assert torch.equal(actual.nan_to_num(12345.0), expected.nan_to_num(12345.0)), plan


TAILS = ConvShape("tails", 2, 64, 5, 5, 40, 1, 1, "rows and channels that fill no tile")


@every_kernel
@pytest.mark.parametrize(
    ("operand", "at"), [("x", (0, 3, 2, 2)), ("x", (1, 63, 4, 4)), ("weight", (7, 3, 0, 0))]
)
@pytest.mark.parametrize("split", [1, 2])
def test_what_is_not_finite_leads_no_access_outside(
    kernel: str, operand: str, at: tuple[int, ...], split: int
) -> None:
    """The rows and channels of a tile that the output lacks hold zeros, and zero times infinity is none."""
    shape = TAILS if split == 1 else dataclasses.replace(TAILS, c=128)
    problem = channels_last(integer_problem(shape, torch.float32, Wanted(norm="none")))
    given = getattr(problem, operand).clone()
    given[at] = math.inf
    problem = problem.replace(**{operand: given})
    expected = torch.nn.functional.conv2d(problem.x, problem.weight, problem.bias)
    plans = [plan for plan in plan_names(problem, kernel) if f" 64x64x16 split {split} " in plan]
    assert plans
    for plan in plans:
        actual = problem.call(conv_norm_act, plan=plan, sanitized=True)
        assert torch.equal(actual.nan_to_num(12345.0), expected.nan_to_num(12345.0)), plan


@every_kernel
def test_padding_times_an_infinite_weight_is_no_number(kernel: str) -> None:
    """As with every other kernel and with PyTorch: what a plan computes must not depend on the plan."""
    x, w = torch.ones(1, 64, 4, 4), torch.ones(32, 64, 3, 3)
    w[:, 0, 0, 0] = math.inf
    expected = conv_norm_act(x, w, padding=1, plan="direct")
    assert expected[0, 0, 0].isnan().all()
    assert torch.equal(conv_norm_act(x, w, padding=1, plan=kernel).nan_to_num(1.0), expected.nan_to_num(1.0))


@pytest.fixture
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("exact_float32")
def test_the_plan_takes_them_where_float32_is_to_be_exact() -> None:
    wide = ConvProblem(32, 256, 14, 14, 256, 3, 3, padding=1, dtype=torch.float32)
    assert explain(wide).kernel == "implicit_gemm_tf32x3"
    assert explain(wide, device="L4").kernel == "implicit_gemm_fp32", "tensor cores are no faster there"
    short = ConvProblem(32, 32, 56, 56, 64, 1, 1, dtype=torch.float32)
    assert explain(short).kernel == "implicit_gemm_fp32"
    reasons = {c["kernel"]: c["illegal"] for c in explain(short).candidates if c["illegal"]}
    assert "32 products" in reasons["implicit_gemm_tf32x3"]
    half = explain(ConvProblem(32, 256, 14, 14, 256, 3, 3, padding=1))
    for kernel in KERNELS:
        assert "float16" in next(c["illegal"] for c in half.candidates if c["kernel"] == kernel)
