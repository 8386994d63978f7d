"""What is special to the implicit GEMMs: splits, masks of filter rows, and the accuracy of strict float32."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.conformance import Subject, random_case, without_zeros
from tests.conftest import Backend, Simulator
from tests.families import BY_NAME, Family, family_shape, laid_out
from tests.layouts import channels_last
from tests.reference import Wanted, integer_problem, relative_error, unit_roundoff
from tests.shapes import shape_named, table
from tests.simt import conv_norm_act, list_plans

GEMMS = [BY_NAME[f"implicit_gemm_{name}"] for name in ("sm80", "tf32x3", "fp32")]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param(f, dtype, id=f"{f}-{dtype}") for f in GEMMS for dtype in f.dtypes],
)
@pytest.mark.parametrize("name", ["layer_14x14", "many_chunks"])
def test_every_split_is_exact_and_repeats(
    kernels: Backend, name: str, family: Family, dtype: torch.dtype
) -> None:
    subject = Subject(kernels, family, name, dtype)
    shape = shape_named(name) if name == "many_chunks" else family_shape(family.name, name)
    wanted = Wanted("relu", residual_order=subject.chance.choice(("add_act", "act_add")))
    problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
    splits = {plan.split()[3]: plan for plan in subject.plans(problem) if " 64x64x" in plan}
    assert len(splits) > 2
    subject.check(problem, splits.values())
    problem = laid_out(random_case(shape, dtype, wanted), channels_last)
    subject.check_error(problem, splits.values())
    subject.check_repeats(problem, splits.values())


@pytest.mark.parametrize("name", ["filter_of_mask", "filter_over_mask"])
def test_sanitizers_accept_a_mask_with_every_bit(name: str) -> None:
    subject = Subject(Simulator(), BY_NAME["implicit_gemm_sm80"], name)
    problem = laid_out(
        integer_problem(family_shape("implicit_gemm_sm80", name), torch.float16), channels_last
    )
    plans = [plan for plan in subject.plans(problem) if " 64x64x32 split 1 " in plan]
    assert plans
    subject.check(problem, plans, sanitized=True)


KERNELS = ("implicit_gemm_fp32", "implicit_gemm_tf32x3")
UNIT = unit_roundoff(torch.float32)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


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
    subject = Subject(Simulator(), BY_NAME[kernel])
    problem = laid_out(
        integer_problem(family_shape(kernel, "strided"), torch.float32, Wanted(norm="none")), channels_last
    )
    problem = problem.replace(weight=without_zeros(problem.weight))
    problem.x[0, 150, 4, 3], problem.x[0, 3, 8, 8] = math.inf, math.nan
    by_split = {plan.split()[3]: plan for plan in subject.plans(problem)}
    assert len(by_split) > 1
    expected = subject.check_not_finite(problem, by_split.values())
    assert all(kind(expected).any() for kind in (torch.isinf, torch.isnan, torch.isfinite))


(TAILS,) = table("""
tails | 2x64x5x5 40x1x1 | rows and channels that fill no tile
""")


@every_kernel
@pytest.mark.parametrize(
    ("operand", "at"), [("x", (0, 3, 2, 2)), ("x", (1, 63, 4, 4)), ("weight", (7, 3, 0, 0))]
)
@pytest.mark.parametrize("split", [1, 2])
def test_what_is_not_finite_leads_no_access_outside(
    kernel: str, operand: str, at: tuple[int, ...], split: int
) -> None:
    """The rows and channels of a tile that the output lacks hold zeros, and zero times infinity is none."""
    subject = Subject(Simulator(), BY_NAME[kernel])
    shape = TAILS if split == 1 else dataclasses.replace(TAILS, c=128)
    problem = laid_out(integer_problem(shape, torch.float32, Wanted(norm="none")), channels_last)
    getattr(problem, operand)[at] = math.inf
    plans = [plan for plan in subject.plans(problem) if f" 64x64x16 split {split} " in plan]
    assert plans
    subject.check_not_finite(problem, plans, sanitized=True)
