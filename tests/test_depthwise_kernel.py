"""The depthwise kernel, simulated: every version, width of access and layout; and when the plan takes it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from fused_cna import ConvProblem, explain
from tests.layouts import (
    LAYOUTS,
    Layout,
    channels_last,
    misaligned_channels_last,
    odd_unit_strides,
    sliced_channels_last,
)
from tests.plans import plan_names
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    Problem,
    Wanted,
    error_bound,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
)
from tests.shapes import ConvShape
from tests.simt import conv_norm_act
from tests.test_plan import real_layers

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def depthwise(
    name: str,
    n: int,
    c: int,
    size: tuple[int, int],
    filter_size: tuple[int, int],
    reason: str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    multiplier: int = 1,
) -> ConvShape:
    return ConvShape(
        name, n, c, *size, c * multiplier, *filter_size, reason, stride, padding, dilation, groups=c
    )


# Around strips of 7 columns, bands of up to 16 rows, slabs of up to 8 chunks of 16 bytes, and 128 threads.
FILTERS = (
    depthwise("3x3", 2, 64, (14, 14), (3, 3), "whole strips, a whole slab of half", padding=(1, 1)),
    depthwise("5x5", 3, 72, (7, 7), (5, 5), "a block over several images, two slabs of 5", padding=(2, 2)),
    depthwise("7x7", 1, 24, (17, 9), (7, 7), "two bands of 9 rows, one too many", padding=(3, 3)),
    depthwise("3x3_stride2", 2, 16, (33, 29), (3, 3), "a strip of one column left", (2, 2), (1, 1)),
    depthwise("5x5_stride2", 2, 24, (18, 17), (5, 5), "even height, odd width", (2, 2), (2, 2)),
    depthwise("7x7_stride2", 1, 40, (16, 18), (7, 7), "a lone row of taps at each border", (2, 2), (3, 3)),
)
NARROW = (
    depthwise("3x3_by_8", 2, 20, (9, 8), (3, 3), "channels mod 4: accesses of 8 in half", padding=(1, 1)),
    depthwise("5x5_by_4", 1, 22, (8, 15), (5, 5), "channels mod 2: accesses of 4 in half", padding=(2, 2)),
    depthwise("7x7_by_4", 1, 6, (8, 8), (7, 7), "less than a chunk of half", padding=(3, 3)),
    depthwise("3x3_stride2_by_4", 2, 70, (9, 10), (3, 3), "two slabs, a partial chunk", (2, 2), (1, 1)),
    depthwise("5x5_stride2_by_8", 1, 12, (13, 16), (5, 5), "TensorFlow's pads", (2, 2), (1, 2, 1, 2)),
    depthwise("7x7_stride2_by_4", 1, 10, (14, 13), (7, 7), "less than a chunk and a half", (2, 2), (2, 3)),
)
ANY = (
    depthwise("1x1", 2, 48, (7, 7), (1, 1), "one tap"),
    depthwise("1x11", 1, 16, (9, 15), (1, 11), "one row of taps", padding=(0, 5)),
    depthwise("11x1", 1, 20, (15, 9), (11, 1), "one column of taps, narrow accesses", padding=(5, 0)),
    depthwise("9x9", 1, 18, (10, 9), (9, 9), "three passes over the weights", padding=(4, 4)),
    depthwise("dilated", 1, 16, (18, 17), (5, 5), "taps apart", padding=(4, 4), dilation=(2, 2)),
    depthwise("mixed", 2, 8, (13, 15), (3, 2), "all differs by direction", (2, 3), (2, 1), (3, 2)),
    depthwise("3x3_stride3", 1, 8, (14, 23), (3, 3), "a stride without a version of its own", (3, 3)),
    depthwise("far_stride", 2, 8, (5, 40), (2, 2), "pixels that nobody reads", (4, 9)),
    depthwise("twice", 2, 12, (9, 15), (3, 3), "multiplier 2", (2, 2), (1, 1), multiplier=2),
    depthwise("thrice", 1, 21, (7, 7), (5, 5), "multiplier 3, two slabs of half", (1, 1), (2, 2), (1, 1), 3),
    depthwise("odd", 1, 13, (8, 9), (3, 3), "odd channels", padding=(1, 1)),
    depthwise("one_channel", 2, 1, (9, 8), (3, 3), "C = 1, and then K = 5", (1, 1), (1, 1), (1, 1), 5),
    depthwise("all_padding", 1, 8, (3, 4), (3, 3), "outputs that read only padding", padding=(4, 9)),
    depthwise("one_pixel", 5, 8, (1, 1), (3, 3), "only the middle tap counts", padding=(1, 1)),
)
SHAPES = (*FILTERS, *NARROW, *ANY)


def dense(problem: Problem) -> Problem:
    return problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))


def depthwise_plans(problem: Problem, device: str | None = None) -> list[str]:
    return plan_names(problem, "depthwise", device=device)


def version(plan: str) -> str:
    """What tells the instantiations of one dtype apart: filter, stride and access."""
    return plan.partition(" ")[2].partition(" ")[2].removesuffix(" after a copy of x")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.int16)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact_in_every_version(shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    wanted = Wanted(
        act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "add_act", "act_add"))
    )
    problem = integer_problem(shape, dtype, wanted)
    expected = expected_rounded(problem)
    for given in (dense(problem), problem, dense(problem).replace(x=misaligned_channels_last(problem.x))):
        plans = depthwise_plans(given)
        assert plans
        for plan in plans:
            result = given.call(conv_norm_act, plan=plan, seed=chance.randrange(1000))
            assert torch.equal(result, expected), plan


def test_the_shapes_reach_every_version() -> None:
    reached = {
        version(plan)
        for shape in SHAPES
        for plan in depthwise_plans(dense(integer_problem(shape, torch.float16)))
    }
    filters = [f"{size}x{size} stride {stride}" for size in (3, 5, 7) for stride in (1, 2)]
    accesses = {f"{kind} {access}-byte" for kind in (*filters, "any filter") for access in (16, 4)}
    assert reached == accesses | {"any filter by value"}


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_stays_within_the_bound(shape: ConvShape, dtype: torch.dtype) -> None:
    problem = dense(random_problem(shape, dtype, Wanted("silu", residual_order="add_act")))
    expected = expected_exactly(problem)
    for plan in depthwise_plans(problem):
        error = relative_error(problem.call(conv_norm_act, plan=plan), expected)
        assert error <= error_bound(dtype), f"{plan}: {error:.3g}"


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    problem = dense(
        random_problem(FILTERS[0], dtype, Wanted(act, ACTIVATIONS[act], residual_order="act_add"))
    )
    error = relative_error(problem.call(conv_norm_act, plan="depthwise"), expected_exactly(problem))
    assert error <= error_bound(dtype)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [FILTERS[0], NARROW[0], ANY[5], ANY[8]], ids=str)
def test_inputs_in_any_layout(shape: ConvShape, layout: Layout, dtype: torch.dtype) -> None:
    problem = dense(integer_problem(shape, dtype, Wanted(residual_order="add_act")))
    assert problem.residual is not None
    for changed in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(residual=layout(problem.residual)),
    ):
        result = changed.call(conv_norm_act, plan="depthwise")
        assert torch.equal(result, expected_rounded(changed))


def test_strides_of_single_pixels_and_channels_are_not_read() -> None:
    for shape in (ANY[11], ANY[13]):
        problem = dense(integer_problem(shape, torch.float16))
        problem = problem.replace(
            x=odd_unit_strides(problem.x, 7), weight=odd_unit_strides(problem.weight, 7)
        )
        assert torch.equal(problem.call(conv_norm_act, plan="depthwise"), expected_rounded(problem))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_nan_or_infinity_reaches_only_the_outputs_that_read_it(shape: ConvShape, value: float) -> None:
    problem = dense(integer_problem(shape, torch.float16))
    problem.x[0, shape.c // 2, shape.h // 2, shape.w // 2] = value
    expected = expected_exactly(problem)
    for plan in depthwise_plans(problem):
        assert torch.equal(problem.call(conv_norm_act, plan=plan).isfinite(), expected.isfinite()), plan
    problem = dense(integer_problem(shape, torch.float16))
    others = torch.arange(shape.k) != shape.k // 2
    expected = expected_rounded(problem)
    problem.weight[~others] = value
    for plan in depthwise_plans(problem):
        result = problem.call(conv_norm_act, plan=plan)
        assert torch.equal(result[:, others], expected[:, others]), plan
        assert not result[:, ~others].isfinite().any(), plan


@pytest.mark.parametrize("shape", [FILTERS[1], NARROW[3], ANY[3], ANY[8]], ids=str)
def test_results_repeat_bit_for_bit_in_any_thread_order(shape: ConvShape) -> None:
    problem = dense(random_problem(shape, torch.float16, Wanted("silu", residual_order="add_act")))
    for plan in depthwise_plans(problem):
        first = problem.call(conv_norm_act, plan=plan)
        for seed in (1, 2, 3):
            assert torch.equal(bits(problem.call(conv_norm_act, plan=plan, seed=seed)), bits(first)), plan


@pytest.mark.parametrize(
    "shape",
    [
        depthwise("rounds", 7, 64, (56, 56), (3, 3), "more blocks than a small device runs", padding=(1, 1)),
        depthwise("rounds_9x9", 5, 64, (56, 56), (9, 9), "weights anew in every round", padding=(4, 4)),
    ],
    ids=str,
)
def test_blocks_take_several_rounds(shape: ConvShape) -> None:
    problem = dense(integer_problem(shape, torch.float16))
    chosen = depthwise_plans(problem, device="L4")[0]
    described = ConvProblem(*shape.x_size, shape.k, shape.r, shape.s, padding=shape.r // 2, groups=shape.c)
    plan = next(c for c in explain(described, device="L4").candidates if c["name"] == chosen)
    pixels, channels, _ = plan["tile"]
    strips = shape.n * shape.p * -(-shape.q // 7)
    assert plan["blocks"] * (pixels // 7) < strips * -(-shape.k // channels), "one round is enough"
    assert torch.equal(problem.call(conv_norm_act, plan=chosen, device="L4"), expected_rounded(problem))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sanitizers_accept_it(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted(residual_order="act_add"))
    layout = chance.choice((channels_last, channels_last, sliced_channels_last))
    given = dense(problem).replace(x=layout(problem.x))
    plan = depthwise_plans(given)[0]
    assert torch.equal(given.call(conv_norm_act, plan=plan, sanitized=True), expected_rounded(problem)), plan


MOBILE = ConvProblem(8, 96, 28, 28, 96, 3, 3, padding=1, groups=96)


def illegal(problem: ConvProblem, text: str) -> list[str]:
    """The reasons against the kernel's plans that contain `text`."""
    found = [c["illegal"] for c in explain(problem).candidates if c["kernel"] == "depthwise"]
    return [reason for reason in found if text in reason]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_the_plan_takes_it_for_the_depthwise_layers_of_real_networks(dtype: torch.dtype) -> None:
    layers = [p for _, p in real_layers() if p.groups == p.c > 1]
    assert len(layers) > 700
    for problem in layers:
        problem = dataclasses.replace(problem, dtype=dtype)
        candidates = explain(problem).candidates
        # where products are the bound tensor cores are faster, and few pixels have a kernel of their own
        chosen = next(c for c in candidates if c["kernel"] == "depthwise" and not c["illegal"])
        is_special = candidates[0]["kernel"] in ("depthwise", "depthwise_toeplitz", "small_m")
        assert is_special or chosen["estimate_us"] < 1.01 * candidates[0]["estimate_us"], problem
        own = problem.r == problem.s and problem.r in (3, 5, 7) and problem.dilation == (1, 1)
        own = own and problem.k == problem.c and problem.stride in ((1, 1), (2, 2))
        assert ("any filter" not in chosen["name"]) == own, problem
        assert ("by value" in chosen["name"]) == (problem.k != problem.c), problem


@pytest.mark.parametrize(
    ("channels", "dtype", "name"),
    [
        (96, torch.float16, "depthwise 147x48x9 3x3 stride 1 16-byte"),
        (72, torch.float16, "depthwise 175x40x9 3x3 stride 1 16-byte"),
        (24, torch.bfloat16, "depthwise 294x24x9 3x3 stride 1 16-byte"),
        (20, torch.bfloat16, "depthwise 294x24x9 3x3 stride 1 4-byte"),
        (22, torch.float32, "depthwise 147x24x9 3x3 stride 1 4-byte"),
        (27, torch.float32, "depthwise 126x28x9 3x3 stride 1 4-byte"),
        (27, torch.float16, "depthwise 224x32x9 any filter by value"),
    ],
)
def test_slabs_and_accesses_follow_the_channels(channels: int, dtype: torch.dtype, name: str) -> None:
    problem = dataclasses.replace(MOBILE, c=channels, k=channels, groups=channels, dtype=dtype)
    assert explain(problem).candidates[0]["name"] == name


def test_channels_that_are_not_dense_are_copied_and_weights_never() -> None:
    from fused_cna import ConvNormAct

    module = ConvNormAct(96, 96, 3, padding=1, groups=96).half().eval()
    nchw = explain(module, torch.randn(8, 96, 28, 28).half()).candidates[0]
    assert nchw["name"].endswith("3x3 stride 1 16-byte after a copy of x")
    assert nchw["convert_x"]
    assert not nchw["convert_weight"]
    x = torch.randn(8, 96, 28, 28).half().contiguous(memory_format=torch.channels_last)
    assert not explain(module, x).candidates[0]["convert_x"]
    aligned_to_8 = torch.randn(8, 28, 28, 100).half().permute(0, 3, 1, 2)[:, 4:]
    assert explain(module, aligned_to_8).candidates[0]["access_bytes"] == 4


def test_why_a_version_is_out() -> None:
    assert illegal(dataclasses.replace(MOBILE, groups=48), "one input channel a group, there are 2")
    assert illegal(MOBILE, "takes 7x7 filters with stride 2 and dilation 1")
    assert len(illegal(dataclasses.replace(MOBILE, dilation=2), "dilation 1")) == 6
    assert illegal(dataclasses.replace(MOBILE, k=192), "one output channel per input channel, there are 2")
    odd = dataclasses.replace(MOBILE, c=27, k=27, groups=27)
    assert illegal(odd, "27 channels allow loads of 2 bytes, this version takes at least 4")
    assert illegal(dataclasses.replace(MOBILE, w=2**31 - 2000, stride=300), "ends at row or column 21474")
    assert illegal(dataclasses.replace(MOBILE, n=2**26, c=8, k=8, groups=8), "strips or blocks")


def test_large_layers_are_even_between_memory_and_instructions_at_3x3_and_bound_by_these_above() -> None:
    large = dataclasses.replace(MOBILE, n=32, h=112, w=112)
    small_filter = explain(large).candidates[0]
    assert 0.8 < small_filter["bytes_us"] / small_filter["products_us"] < 1.25
    large_filter = explain(dataclasses.replace(large, r=7, s=7, padding=3)).candidates[0]
    assert large_filter["products_us"] > 1.5 * large_filter["bytes_us"]
