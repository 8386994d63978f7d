"""The depthwise kernel on tensor cores: tiles, filters, borders, layouts, infinities, and its plans."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fused_cna import ConvProblem, explain
from tests.layouts import LAYOUTS, Layout, channels_last
from tests.plans import plan_names
from tests.reference import (
    ACTIVATIONS,
    NORM_PARTS,
    Problem,
    Wanted,
    error_bound,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import ConvShape
from tests.simt import conv_norm_act

KERNEL = "depthwise_toeplitz"


def depthwise(
    name: str, n: int, c: int, h: int, w: int, r: int, s: int, padding: tuple[int, ...], reason: str
) -> ConvShape:
    return ConvShape(name, n, c, h, w, c, r, s, reason, padding=padding, groups=c)


# A tile is at most 16 strips of 4 x 8 outputs by 16 channels.
SHAPES = (
    depthwise("convnext_14", 2, 32, 14, 14, 7, 7, (3, 3), "the commonest wide filter, two slabs of channels"),
    depthwise("convnext_7", 5, 16, 7, 7, 7, 7, (3, 3), "several small images in a tile, the last one partly"),
    depthwise("efficientnet_7", 3, 24, 7, 7, 5, 5, (2, 2), "a slab of 8 channels at the end, as wide loads"),
    depthwise("mobilenet_28", 1, 16, 28, 28, 5, 5, (2, 2), "a tile's whole height, four strips across"),
    depthwise("over_a_tile", 1, 16, 21, 45, 7, 7, (3, 3), "tiles in both directions, halos, tails in both"),
    depthwise("wide_image", 1, 16, 5, 131, 5, 5, (2, 2), "sixteen strips across, and more"),
    depthwise("high_image", 1, 16, 70, 5, 7, 3, (3, 1), "sixteen strips down, and more"),
    depthwise("channels_mod_4", 2, 20, 9, 11, 7, 7, (3, 3), "8-byte aligned pixels: narrow loads"),
    depthwise("channels_mod_2", 2, 38, 9, 6, 5, 7, (2, 3), "4-byte aligned pixels, a tail of 6 channels"),
    depthwise("two_channels", 1, 2, 8, 9, 3, 3, (1, 1), "as few channels as loads of 4 bytes allow"),
    depthwise(
        "filter_2x2", 1, 16, 6, 9, 2, 2, (0, 1), "the narrowest filter, even, more columns out than in"
    ),
    depthwise("filter_1x8", 1, 16, 5, 19, 1, 8, (0, 3), "one row of taps, an even filter"),
    depthwise("filter_9x9", 1, 16, 13, 14, 9, 9, (4, 4), "the widest filter, two passes and a row of zeros"),
    depthwise("filter_3x9", 2, 16, 6, 17, 3, 9, (1, 4), "wider than high"),
    depthwise("filter_31x5", 1, 16, 33, 9, 31, 5, (15, 2), "many passes"),
    depthwise("filter_11x4", 1, 16, 12, 12, 11, 4, (5, 2), "a pass that starts within a strip's rows"),
    depthwise("filter_image", 2, 16, 7, 7, 7, 7, (0, 0), "one output pixel"),
    depthwise("filter_over_image", 1, 16, 3, 2, 7, 7, (3, 3), "every output reads padding"),
    depthwise("padding_asymmetric", 2, 16, 10, 9, 4, 6, (1, 2, 0, 5), "four different pads, an even filter"),
    depthwise("padding_over_filter", 1, 16, 4, 5, 3, 5, (6, 9), "whole strips see only zeros"),
    depthwise("one_row", 3, 16, 1, 23, 5, 5, (2, 2), "H = 1"),
    depthwise("one_column", 3, 16, 23, 1, 5, 5, (2, 2), "W = 1"),
)

BY_NAME = {shape.name: shape for shape in SHAPES}
TELLING = tuple(BY_NAME[name] for name in ("convnext_7", "over_a_tile", "channels_mod_2", "filter_9x9"))

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def dense(problem: Problem) -> Problem:
    return problem.replace(x=channels_last(problem.x))


def plans_of(problem: Problem, device: str | None = None) -> list[str]:
    return plan_names(problem, KERNEL, device=device)


def check_exact(problem: Problem, plan: str = KERNEL, **extra: Any) -> None:
    result = problem.call(conv_norm_act, plan=plan, **extra)
    assert torch.equal(result, expected_rounded(problem)), plan


def check_error(problem: Problem, plan: str = KERNEL) -> None:
    error = relative_error(problem.call(conv_norm_act, plan=plan), expected_exactly(problem))
    allowed = error_bound(problem.x.dtype)
    assert error <= allowed, f"{plan}: relative error {error:.3g} exceeds {allowed:.3g}"


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "add_act")))
    problem = integer_problem(shape, dtype, wanted)
    for given in (problem, dense(problem)):
        plans = plans_of(given)
        for plan in {plans[0], chance.choice(plans)}:
            check_exact(given, plan, seed=chance.randrange(1000))


@pytest.mark.parametrize("name", ["convnext_14", "convnext_7", "over_a_tile", "wide_image", "high_image"])
def test_every_tile_is_exact(name: str) -> None:
    problem = dense(integer_problem(BY_NAME[name], torch.float16, Wanted(residual_order="act_add")))
    for plan in plans_of(problem):
        check_exact(problem, plan)


def test_the_shapes_reach_every_number_of_strips_across_and_down() -> None:
    tiles = {
        tuple(map(int, plan.split()[3].split("x")))
        for shape in SHAPES
        for plan in plans_of(dense(integer_problem(shape, torch.float16)))
    }
    assert {across for _, _, across in tiles} == set(range(1, 17))
    assert {down for _, down, _ in tiles} >= {1, 2, 3, 4, 5, 8, 13, 16}
    assert {images for images, _, _ in tiles} >= {1, 2, 3, 5}
    assert all(images * down * across <= 16 for images, down, across in tiles)


@dtypes
@pytest.mark.parametrize("s", range(2, 10))
def test_every_filter_width_within_the_error_bound(s: int, dtype: torch.dtype) -> None:
    for r in (1, s, 11 - s):
        shape = depthwise("any", 2, 18, 11, 19, r, s, (r // 2, (r - 1) // 2, s // 2, s // 3), "S in 2..9")
        check_error(dense(random_problem(shape, dtype, Wanted("relu", residual_order="add_act"))))


@dtypes
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_inputs_stay_within_the_error_bound(
    shape: ConvShape, dtype: torch.dtype, residual_order: str | None
) -> None:
    check_error(dense(random_problem(shape, dtype, Wanted("relu", residual_order=residual_order))))


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    wanted = Wanted(act, ACTIVATIONS[act], residual_order="act_add")
    check_error(dense(random_problem(BY_NAME["efficientnet_7"], dtype, wanted)))


@dtypes
@pytest.mark.parametrize("norm_in_storage_dtype", [False, True], ids=["norm_float32", "norm_storage"])
@pytest.mark.parametrize("norm", NORM_PARTS)
def test_every_combination_of_norm_parameters(
    norm: str, norm_in_storage_dtype: bool, dtype: torch.dtype
) -> None:
    for bias in (False, True):
        wanted = Wanted(norm=norm, bias=bias, norm_dtype=dtype if norm_in_storage_dtype else torch.float32)
        check_exact(dense(integer_problem(BY_NAME["channels_mod_2"], dtype, wanted)))


@dtypes
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    wanted = Wanted("leaky_relu", (0.1,), residual_order="add_act")
    problem = dense(random_problem(BY_NAME["over_a_tile"], dtype, wanted))
    error = relative_error(problem.call(conv_norm_act, plan=KERNEL), expected_exactly(problem))
    assert error / unit_roundoff(dtype) < 0.45


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_inputs_in_any_layout(layout: Layout, dtype: torch.dtype) -> None:
    problem = dense(integer_problem(BY_NAME["efficientnet_7"], dtype, Wanted(residual_order="add_act")))
    assert problem.residual is not None
    check_exact(problem.replace(x=layout(problem.x)))
    check_exact(problem.replace(weight=layout(problem.weight)))
    check_exact(problem.replace(residual=layout(problem.residual)))
    check_exact(problem.replace(x=layout(problem.x), weight=layout(problem.weight)))


def test_slices_of_channels_are_read_where_they_lie() -> None:
    problem = integer_problem(BY_NAME["efficientnet_7"], torch.float16)
    for channels, first, access in ((40, 8, "16-byte"), (36, 4, "4-byte"), (26, 2, "4-byte")):
        n, c, h, w = problem.x.shape
        storage = torch.full((n, h, w, channels), float("nan"), dtype=torch.float16)
        x = storage[..., first : first + c].permute(0, 3, 1, 2).copy_(problem.x)
        sliced = problem.replace(x=x)
        assert plans_of(sliced)[0].endswith(access)
        check_exact(sliced)


def placed_value(shape: ConvShape, dtype: torch.dtype, value: float, at: tuple[int, int]) -> Problem:
    """Integers with `value` in one pixel of one channel, and weights without a zero."""
    problem = dense(integer_problem(shape, dtype))
    problem.weight.masked_fill_(problem.weight == 0, 3)
    problem.x[-1, shape.c // 2, at[0], at[1]] = value
    return problem


@dtypes
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus_inf"]
)
@pytest.mark.parametrize("shape", TELLING, ids=str)
def test_a_value_that_is_not_finite_reaches_only_the_outputs_that_read_it(
    shape: ConvShape, value: float, dtype: torch.dtype
) -> None:
    places = {(0, 0), (shape.h // 2, shape.w // 2), (shape.h - 1, shape.w - 1), (shape.h // 3, shape.w - 2)}
    if shape.w > 33:
        places |= {(5, 8), (17, 31), (16, 32)}  # by borders of strips and tiles
    for at in sorted(places):
        problem = placed_value(shape, dtype, value, at)
        actual = problem.call(conv_norm_act, plan=KERNEL)
        expected = expected_exactly(problem)
        assert not expected.isfinite().all()
        assert torch.equal(actual.isnan(), expected.isnan()), at
        assert torch.equal(actual.isinf(), expected.isinf()), at
        assert torch.equal(
            actual.nan_to_num(0, 0, 0).sign(), expected.to(dtype).nan_to_num(0, 0, 0).sign()
        ), at
        finite = expected.isfinite()
        assert torch.equal(actual[finite], expected.to(dtype)[finite]), at


@dtypes
def test_infinities_of_both_signs_meet_as_in_the_formula(dtype: torch.dtype) -> None:
    problem = placed_value(BY_NAME["over_a_tile"], dtype, float("inf"), (9, 20))
    problem.x[-1, 8, 12, 17] = float("-inf")
    actual, expected = problem.call(conv_norm_act, plan=KERNEL), expected_exactly(problem)
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected.to(dtype)[infinite])


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_filter_that_is_not_finite_reaches_only_its_channel(value: float, dtype: torch.dtype) -> None:
    shape = BY_NAME["convnext_7"]
    problem = dense(integer_problem(shape, dtype))
    others = torch.arange(shape.k) != 5
    expected = expected_rounded(problem)[:, others]
    problem.weight[5] = value
    actual = problem.call(conv_norm_act, plan=KERNEL)
    assert torch.equal(actual[:, others], expected)
    assert not actual[:, 5].isfinite().any()


@dtypes
def test_sums_beyond_float16_stay_finite_until_the_store(dtype: torch.dtype) -> None:
    """The largest values a type has, which the fold brings back into its range."""
    shape = BY_NAME["convnext_7"]
    problem = dense(random_problem(shape, dtype))
    problem = problem.replace(
        x=torch.full_like(problem.x, 60000.0), running_var=torch.full((shape.k,), 1e12), act="relu"
    )
    assert expected_exactly(problem).isfinite().all()
    check_error(problem)


@dtypes
@pytest.mark.parametrize("shape", TELLING, ids=str)
def test_results_repeat_bit_for_bit_in_any_thread_order(shape: ConvShape, dtype: torch.dtype) -> None:
    problem = dense(random_problem(shape, dtype, Wanted("silu", residual_order="add_act")))
    first = problem.call(conv_norm_act, plan=KERNEL, seed=0)
    for seed in (1, 2, 3):
        again = problem.call(conv_norm_act, plan=KERNEL, seed=seed)
        assert torch.equal(again.view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sanitizers_accept_it(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    dtype = chance.choice((torch.float16, torch.bfloat16))
    problem = integer_problem(shape, dtype, Wanted(residual_order="act_add"))
    given = chance.choice((problem, dense(problem), dense(problem)))
    check_exact(given, chance.choice(plans_of(given)), sanitized=True)


def test_sanitizers_accept_the_sum_by_the_formula() -> None:
    problem = placed_value(BY_NAME["filter_9x9"], torch.float16, float("inf"), (6, 6))
    actual = problem.call(conv_norm_act, plan=KERNEL, sanitized=True)
    assert torch.equal(actual.isfinite(), expected_exactly(problem).isfinite())


def convnext(n: int = 32, **changes: Any) -> ConvProblem:
    fields: dict[str, Any] = {
        "c": 384, "h": 14, "w": 14, "k": 384, "r": 7, "s": 7, "padding": 3, "groups": 384,
    }  # fmt: skip
    return ConvProblem(n, **fields | changes)


def reason(problem: ConvProblem, device: str = "H100") -> str:
    """Why the kernel is out, in words."""
    found = [c["illegal"] for c in explain(problem, device=device).candidates if c["kernel"] == KERNEL]
    assert found
    assert all(found), "it is legal"
    return str(found[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "not float32"),
        ({"k": 768}, "384 to 768 channels in 384 groups"),
        ({"groups": 192}, "in 192 groups"),
        ({"stride": 2}, "strides and dilations must be 1"),
        ({"dilation": (1, 2), "padding": (3, 6)}, "strides and dilations must be 1"),
        ({"s": 11, "padding": (3, 5)}, "11 wide, it takes widths from 2 to 9"),
        ({"s": 1, "padding": (3, 0)}, "1 wide"),
        ({"c": 27, "k": 27, "groups": 27}, "27 channels allow loads of 2 bytes"),
        ({"h": 400, "r": 399, "padding": (198, 3)}, "399 rows, at most 128 rows"),
        ({"h": 400, "r": 120, "padding": (60, 3)}, "bytes of shared memory, at most 232448"),
    ],
)
def test_why_it_is_out(changes: dict[str, Any], words: str) -> None:
    assert words in reason(convnext(**changes))


def test_more_than_32_bits_can_count_are_refused() -> None:
    pixels = convnext(2**30, c=256, k=256, groups=256, h=1, w=1)
    reasons = {
        c["name"].split()[3]: c["illegal"] for c in explain(pixels).candidates if c["kernel"] == KERNEL
    }
    assert not reasons["16x1x1"]
    assert "2147483648 blocks, at most 2147483647" in reasons["8x1x1"]
    assert "2147483648 images" in reason(convnext(2**31, c=16, k=16, groups=16, h=1, w=1))


@pytest.mark.parametrize("device", ["A100", "H100", "B200"])
@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_wide_filters_run_on_tensor_cores(size: int, device: str) -> None:
    chosen = explain(convnext(h=size, w=size), device=device).candidates[0]
    assert chosen["kernel"] == KERNEL
    assert chosen["access_bytes"] == 16
    assert not chosen["convert_x"]


def test_passes_leave_few_rows_of_zeros() -> None:
    rows_of_pass = {1: 5, 3: 5, 5: 5, 6: 7, 7: 7, 9: 5, 10: 5, 13: 7, 14: 7, 15: 5}
    for r, rows in rows_of_pass.items():
        plans = explain(convnext(h=40, w=40, r=r)).candidates
        assert {c["tile"][2] for c in plans if c["kernel"] == KERNEL} == {rows * 16}


def test_small_batches_take_smaller_tiles() -> None:
    def blocks(n: int) -> tuple[int, int]:
        chosen = next(c for c in explain(convnext(n)).candidates if c["kernel"] == KERNEL)
        return chosen["tile"][0], chosen["blocks"]

    assert blocks(1)[0] < blocks(128)[0]
    assert blocks(1)[1] >= 48


def test_what_cannot_be_read_is_copied_first() -> None:
    chosen = next(c for c in explain(convnext(channels_last=False)).candidates if c["kernel"] == KERNEL)
    assert chosen["convert_x"]
    assert not chosen["convert_weight"]
    assert chosen["name"].endswith("16-byte after a copy of x")
