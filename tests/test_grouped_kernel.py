"""The tensor-core kernel of narrow groups: every reader and tile, bit for bit and within the error bound."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest
import torch

from fused_cna import ConvProblem, explain
from tests.layouts import LAYOUTS, Layout, odd_unit_strides
from tests.plans import plan_names
from tests.reference import (
    DTYPES,
    Problem,
    Wanted,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
)
from tests.shapes import SHAPES, ConvShape
from tests.simt import conv_norm_act
from tests.test_gemm_kernels import Run, bits, check, run
from tests.test_plan import DEVICES, illegal, real_layers
from tests.test_simt_implicit_gemm import channels_last

KERNEL = "grouped"

__all__ = ["run"]  # the fixture, simulated and on a GPU

GROUPED = (
    ConvShape(
        "of_8", 1, 32, 14, 14, 32, 3, 3, "nine chunks: the last step has but one", padding=(1, 1), groups=4
    ),
    ConvShape(
        "of_4", 2, 24, 9, 9, 24, 3, 3, "two words a tap, half an octet of columns", padding=(1, 1), groups=6
    ),
    ConvShape("of_2_to_4", 1, 16, 8, 17, 32, 3, 3, "one word a tap", padding=(1, 1), groups=8),
    ConvShape(
        "of_6_to_5",
        1,
        30,
        9,
        12,
        25,
        3,
        3,
        "three words a tap, columns start at odd ones",
        (1, 2),
        (1, 1),
        groups=5,
    ),
    ConvShape(
        "of_12_to_20", 1, 24, 6, 7, 40, 3, 3, "words, and several octets of columns", padding=(1, 1), groups=2
    ),
    ConvShape(
        "of_16",
        1,
        96,
        7,
        7,
        96,
        3,
        3,
        "six groups: the last slab has fewer of them",
        padding=(1, 1),
        groups=6,
    ),
    ConvShape("of_24", 2, 48, 10, 9, 48, 3, 3, "three octets of columns, stride 2", (2, 2), (1, 1), groups=2),
    ConvShape(
        "of_32_to_44",
        1,
        64,
        5,
        20,
        88,
        3,
        3,
        "the last share of a group's columns is smaller",
        padding=(1, 1),
        groups=2,
    ),
    ConvShape("of_64", 1, 128, 5, 9, 128, 3, 3, "wide groups", padding=(1, 1), groups=2),
    ConvShape("pointwise", 3, 32, 6, 6, 64, 1, 1, "one chunk in all: the first step is the last", groups=4),
    ConvShape("dilated", 1, 16, 15, 13, 16, 5, 4, "a large filter, spread", (1, 1), (4, 3), (2, 2), 2),
    ConvShape(
        "phases", 2, 16, 14, 25, 16, 3, 3, "strides and dilations that differ", (2, 3), (1, 2), (1, 2), 2
    ),
    ConvShape(
        "stride_over_filter", 1, 16, 9, 40, 16, 1, 2, "columns that nothing reads", (3, 4), (0, 1), groups=2
    ),
    ConvShape(
        "long_row", 1, 16, 2, 90, 16, 1, 3, "a row of more pixels than a warp takes", padding=(0, 1), groups=2
    ),
    ConvShape("tall", 1, 16, 40, 3, 16, 3, 1, "a column of pixels, an octet each", padding=(1, 0), groups=2),
    ConvShape(
        "one_pixel", 3, 32, 1, 1, 32, 3, 3, "all but the middle tap is padding", padding=(1, 1), groups=4
    ),
    ConvShape(
        "no_padding",
        1,
        16,
        8,
        8,
        16,
        3,
        3,
        "four different pads, some of them 0",
        padding=(0, 1, 0, 2),
        groups=2,
    ),
    ConvShape(
        "dense", 2, 40, 9, 11, 72, 3, 3, "one group, the last of its column shares narrow", padding=(1, 1)
    ),
    ConvShape("dense_words", 1, 20, 9, 10, 36, 3, 3, "one group of words, stride 2", (2, 2), (1, 1)),
    ConvShape("dense_1x1", 3, 96, 7, 7, 88, 1, 1, "one group and one tap"),
)

SHARED = tuple(shape for shape in SHAPES if 1 < shape.groups < shape.c and shape.n > 0)
"""Those with several groups; the dense ones that fit are many."""

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def grouped_plans(problem: Problem) -> list[str]:
    return plan_names(problem, KERNEL, allow_tf32=True)


def instantiation(plan: str) -> str:
    """The part of a plan's name that says what was compiled: "chunks x2"."""
    return " ".join(plan.split()[3:5])


def one_of_each(problem: Problem, chance: random.Random, more: int = 0) -> set[str]:
    """A plan for each instantiation, and some more."""
    plans = grouped_plans(problem)
    chance.shuffle(plans)
    return {*{instantiation(plan): plan for plan in plans}.values(), *plans[:more]}


@dtypes
@pytest.mark.parametrize("shape", [*GROUPED, *SHARED], ids=str)
def test_integers_are_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "act_add")))
    problem = channels_last(integer_problem(shape, dtype, wanted))
    expected = expected_rounded(problem)
    if dtype != torch.float32 and shape.c // shape.groups % 2:
        assert not grouped_plans(problem), "cp.async copies 4 bytes or more"
        return
    for plan in one_of_each(problem, chance, more=3):
        result = problem.call(conv_norm_act, plan=plan, allow_tf32=True, seed=chance.randrange(1000))
        assert torch.equal(result, expected), plan


@pytest.mark.parametrize("name", ["of_16", "of_32_to_44", "phases"])
def test_every_share_of_pixels_and_channels_is_exact(name: str) -> None:
    problem = channels_last(integer_problem(by_name()[name], torch.float16, Wanted(residual_order="add_act")))
    expected = expected_rounded(problem)
    plans = grouped_plans(problem)
    assert len({plan.split()[1] for plan in plans}) > 3
    for seed, plan in enumerate(plans):
        assert torch.equal(problem.call(conv_norm_act, plan=plan, seed=seed), expected), plan


def by_name() -> dict[str, ConvShape]:
    return {shape.name: shape for shape in GROUPED}


def test_the_shapes_reach_every_instantiation() -> None:
    reached = {
        instantiation(plan) + " " + plan.split()[5]
        for shape in GROUPED
        for plan in grouped_plans(channels_last(integer_problem(shape, torch.float16)))
    }
    assert {f"chunks x{blocks} 16-byte" for blocks in (1, 2, 3, 4)} <= reached
    assert {f"words x1 {access}-byte" for access in (16, 8, 4)} <= reached


@dtypes
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("name", ["of_8", "of_4", "of_6_to_5", "of_24", "of_64"])
def test_the_error_stays_within_the_bound(
    run: Run, name: str, residual_order: str | None, dtype: torch.dtype
) -> None:
    problem = channels_last(
        random_problem(by_name()[name], dtype, Wanted("relu", residual_order=residual_order))
    )
    expected = expected_exactly(problem)
    for plan in one_of_each(problem, random.Random(f"{name} {dtype}")):
        check(run, problem, plan, expected)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["of_8", "of_4"])
def test_inputs_in_any_layout(run: Run, name: str, layout: Layout, dtype: torch.dtype) -> None:
    wanted = Wanted("relu", residual_order="add_act")
    problem = channels_last(random_problem(by_name()[name], dtype, wanted))
    assert problem.residual is not None
    for changed in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(residual=layout(problem.residual)),
    ):
        check(run, changed, KERNEL)


@dtypes
def test_everything_in_nchw(run: Run, dtype: torch.dtype) -> None:
    for shape in GROUPED[:8]:
        check(run, random_problem(shape, dtype, Wanted("silu", residual_order="act_add")), KERNEL)


@dtypes
@pytest.mark.parametrize("name", ["one_pixel", "pointwise", "long_row"])
def test_strides_of_single_elements_are_not_read(name: str, dtype: torch.dtype) -> None:
    problem = channels_last(integer_problem(by_name()[name], dtype))
    problem = problem.replace(x=odd_unit_strides(problem.x, 7), weight=odd_unit_strides(problem.weight, 5))
    for plan in one_of_each(problem, random.Random(name)):
        result = problem.call(conv_norm_act, plan=plan, allow_tf32=True)
        assert torch.equal(result, expected_rounded(problem)), plan


def spread(weight: torch.Tensor) -> torch.Tensor:
    """The same weight as some taps of larger filters: dense channels, and gaps between the taps."""
    k, c, r, s = weight.shape
    larger = torch.full((k, r + 2, 2 * s, c), float("nan"), dtype=weight.dtype).permute(0, 3, 1, 2)
    larger[:, :, 1:-1, ::2] = weight
    return larger[:, :, 1:-1, ::2]


@dtypes
@pytest.mark.parametrize("name", ["of_8", "of_4", "dilated", "tall", "long_row", "pointwise"])
def test_the_taps_of_a_filter_may_lie_apart(run: Run, name: str, dtype: torch.dtype) -> None:
    problem = channels_last(integer_problem(by_name()[name], dtype))
    expected = expected_rounded(problem)
    problem = problem.replace(weight=spread(problem.weight))
    for plan in one_of_each(problem, random.Random(name)):
        assert "copy" not in plan
        assert torch.equal(run(problem, plan), expected), plan


@dtypes
def test_results_repeat_bit_for_bit(run: Run, dtype: torch.dtype) -> None:
    problem = channels_last(random_problem(by_name()["of_16"], dtype, Wanted("silu")))
    for plan in one_of_each(problem, random.Random(0)):
        first = run(problem, plan)
        for seed in (1, 2):
            assert torch.equal(bits(run(problem, plan, seed)), bits(first)), plan


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["of_8", "of_4", "of_2_to_4", "of_6_to_5", "of_24", "pointwise", "phases"])
def test_a_value_that_is_not_finite_reaches_what_reads_it_and_nothing_else(
    run: Run, name: str, value: float, dtype: torch.dtype
) -> None:
    """Neither a neighbouring group, nor the padding of a step: that would turn an infinity into a NaN."""
    shape = by_name()[name]
    problem = channels_last(integer_problem(shape, dtype))
    # no zero among the weights, so that infinity times weight is infinite
    weight = torch.where(problem.weight == 0, torch.ones_like(problem.weight), problem.weight)
    problem = problem.replace(weight=weight)
    group = shape.c // shape.groups
    for channel in (0, group - 1, shape.c - 1):
        given = problem.replace(x=problem.x.clone())
        given.x[0, channel, shape.h // 2, shape.w // 2] = value
        expected = expected_exactly(given).to(dtype)
        assert expected.isfinite().any()
        assert not expected.isfinite().all()
        for plan in one_of_each(given, random.Random(channel)):
            torch.testing.assert_close(run(given, plan), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_sanitizers_accept_it(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted(residual_order="act_add"))
    given = chance.choice((problem, channels_last(problem)))
    plan = chance.choice(grouped_plans(given))
    result = given.call(conv_norm_act, plan=plan, allow_tf32=True, sanitized=True)
    assert torch.equal(result, expected_rounded(problem)), plan


@cache
def grouped_layers() -> list[tuple[int, ConvProblem]]:
    return [(uses, p) for uses, p in real_layers() if 1 < p.groups < p.c]


def test_no_grouped_layer_of_real_networks_is_left_to_direct() -> None:
    assert len(grouped_layers()) > 150
    kernels = {p: explain(p).kernel for _, p in grouped_layers()}
    assert "direct" not in kernels.values()
    narrow = [p for p in kernels if p.c // p.groups < 24 and p.r > 1]
    assert len(narrow) > 60
    assert {kernels[p] for p in narrow} == {KERNEL}


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_runs_groups_of_a_resnext_layer(device: str) -> None:
    assert (
        explain(ConvProblem(8, 256, 28, 28, 256, 3, 3, padding=1, groups=32), device=device).kernel == KERNEL
    )


def test_the_rectangle_suits_the_image() -> None:
    chosen = explain(ConvProblem(32, 512, 7, 7, 512, 3, 3, padding=1, groups=32)).candidates[0]
    assert chosen["kernel"] == KERNEL
    assert re.match(r"grouped 64x\d+x16 7x7 chunks x\d 16-byte$", chosen["name"])
    for _, problem in grouped_layers():
        for c in explain(problem).candidates:
            if c["kernel"] == KERNEL and not c["illegal"]:
                p, q = map(int, c["name"].split()[2].split("x"))
                assert p * -(-q // 8) * 8 <= c["tile"][0], c["name"]


def test_why_it_is_out() -> None:
    def layer(c: int, k: int, groups: int, **options: object) -> ConvProblem:
        return ConvProblem(8, c, 28, 28, k, 3, 3, padding=1, groups=groups, **options)

    assert "one channel" in illegal(layer(64, 64, 64), KERNEL)
    assert "3 channels" in illegal(layer(48, 64, 16), KERNEL)
    assert "12 channels" in illegal(layer(48, 64, 4), f"{KERNEL} 64x8")
    assert "8 output channels" in illegal(layer(64, 64, 8), f"{KERNEL} 64x16")
    distant = ConvProblem(1, 64, 4, 4, 64, 3, 3, padding=2**29, dilation=2**29, groups=8)
    assert "it counts to" in illegal(distant, KERNEL)
    large = ConvProblem(8, 512, 28, 28, 512, 31, 31, padding=15, groups=2)
    assert "shared memory" in illegal(large, KERNEL)


def test_float32_that_is_to_be_exact_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem(8, 64, 28, 28, 64, 3, 3, padding=1, groups=8, dtype=torch.float32)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert "tf32" in illegal(problem, KERNEL)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert explain(problem).kernel == KERNEL
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
