"""The stem kernel: four input channels or fewer, in any layout, with every filter."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_cna
from fused_cna import ConvProblem, explain
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, channels_last, contiguous, misaligned, sliced_channels_last
from tests.plans import plan_names
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    FLOAT32_ERROR,
    Problem,
    Wanted,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import SHAPES, ConvShape
from tests.simt import conv_norm_act, list_plans
from tests.test_gemm_kernels import bits, bound, rounded_to_tf32, run_on_gpu, truncated_to_tf32

LAYERS = Path(__file__).parents[1] / "bench" / "data" / "conv_layers.csv"

TILES = ("256x64", "256x32", "128x64", "128x32", "64x64", "64x32")

# Each for one more property of the window of x, of the words of the reduction or of their chunks.
STEMS = (
    ConvShape("resnet", 1, 3, 21, 32, 72, 7, 7, "units, a lead, two tiles of channels", (2, 2), (3, 3)),
    ConvShape("mobile", 2, 3, 20, 24, 24, 3, 3, "units, a lead, half a tile of channels", (2, 2), (1, 1)),
    ConvShape(
        "vgg", 1, 3, 18, 16, 40, 3, 3, "units of pixels that are padded to four values", padding=(1, 1)
    ),
    ConvShape("patchify", 2, 3, 16, 24, 48, 4, 4, "no padding: no lead", (4, 4)),
    ConvShape("alexnet", 1, 3, 27, 32, 9, 11, 11, "a lead of none, many words", (4, 4), (2, 2)),
    ConvShape("shortcut", 2, 3, 9, 16, 33, 1, 1, "a run of two words, half of the pixels unread", (2, 2)),
    ConvShape("odd_width", 1, 3, 13, 15, 16, 3, 3, "rows that end within a unit", (2, 2), (1, 1)),
    ConvShape("even_run", 1, 3, 9, 16, 8, 4, 4, "a lead before a run of whole words", (2, 2), (1, 1)),
    ConvShape("one_of_two", 2, 1, 9, 13, 8, 3, 3, "C = 1 with a lead", (2, 2), (1, 1)),
    ConvShape("two_channels", 1, 2, 9, 7, 10, 3, 3, "a pixel is a word", padding=(1, 1)),
    ConvShape("four_channels", 2, 4, 9, 11, 64, 5, 3, "a pixel is two words", padding=(2, 1)),
    ConvShape("dilated", 1, 3, 13, 16, 8, 3, 3, "taps apart in the window", (2, 2), (2, 2), (2, 3)),
    ConvShape("skips_rows", 2, 3, 19, 22, 8, 3, 2, "rows between windows are left out", (5, 4), (1, 0)),
    ConvShape("skips_dilated", 1, 3, 31, 16, 8, 3, 2, "the same, dilated", (9, 2), (1, 1), (3, 1)),
    ConvShape("patches", 1, 3, 32, 48, 40, 16, 16, "a patch embedding", (16, 16)),
    ConvShape("large_patches", 1, 3, 64, 96, 40, 32, 32, "chunks of patches, rows left out", (32, 32)),
    ConvShape(
        "long_filter", 1, 3, 48, 29, 9, 37, 13, "chunks of a window, the last one short", (2, 2), (4, 5)
    ),
    ConvShape("padding_over_image", 1, 3, 3, 8, 8, 3, 3, "windows of zeros only", (2, 2), (9, 11)),
    ConvShape("asymmetric", 1, 3, 9, 16, 8, 3, 3, "four different pads", (2, 2), (0, 2, 1, 4)),
    ConvShape(
        "mixed_strides", 1, 3, 9, 16, 8, 3, 3, "an odd stride across, an even one down", (2, 3), (1, 1)
    ),
)

SMALL = tuple(
    shape for shape in SHAPES if shape.groups == 1 and shape.c <= 4 and shape.n > 0
)  # of those that every kernel runs

ALL = (*STEMS, *SMALL)

Run = Callable[..., Tensor]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run_simulated(problem: Problem, plan: str = "stem", seed: int = 0, **extra: Any) -> Tensor:
    return problem.call(conv_norm_act, plan=plan, allow_tf32=True, seed=seed, **extra)


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a plan of the stem kernel, simulated and real; float32 rounds to tf32, torch's default."""
    if request.param == "simt":
        yield run_simulated
        return
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    yield run_on_gpu


def laid_out(problem: Problem, layout: Layout) -> Problem:
    return problem.replace(x=layout(problem.x), weight=layout(problem.weight))


def stem_plans(problem: Problem, device: str | None = None) -> list[str]:
    return plan_names(problem, "stem", device=device, allow_tf32=True)


def is_chunked(plan: str, shape: ConvShape) -> bool:
    return int(plan.split()[-1]) < shape.r


@dtypes
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_integers_are_exact(run: Run, shape: ConvShape, layout: Layout, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype} {layout}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "act_add")))
    problem = laid_out(integer_problem(shape, dtype, wanted), layout)
    for plan in chance.sample(stem_plans(problem), 2):
        assert torch.equal(run(problem, plan, chance.randrange(1000)), expected_rounded(problem)), plan


@dtypes
@pytest.mark.parametrize("shape", [STEMS[1], STEMS[2]], ids=str)
def test_every_tile_is_exact(run: Run, shape: ConvShape, dtype: torch.dtype) -> None:
    problem = integer_problem(shape, dtype, Wanted(residual_order="add_act"))
    expected = expected_rounded(problem)
    plans = stem_plans(problem)
    assert sorted(plan.split()[1].rpartition("x")[0] for plan in plans) == sorted(TILES)
    for plan in plans:
        assert torch.equal(run(problem, plan), expected), plan


CHUNKED = tuple(shape for shape in STEMS if shape.r > 30)


@dtypes
@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_chunks_are_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    problem = integer_problem(shape, dtype)
    chunked = [plan for plan in stem_plans(problem, "L4") if is_chunked(plan, shape)]
    assert chunked
    for plan in random.Random(f"{shape} {dtype}").sample(chunked, 2):
        assert torch.equal(run_simulated(problem, plan, device="L4"), expected_rounded(problem)), plan


MANY_TILES = ConvShape("many_tiles", 3, 3, 145, 160, 9, 3, 3, "more tiles than blocks", (2, 2), (1, 1))


@dtypes
def test_a_block_makes_many_tiles_one_after_the_other(dtype: torch.dtype) -> None:
    shape = MANY_TILES
    problem = integer_problem(shape, dtype, Wanted("relu"))
    question = ConvProblem(3, 3, 145, 160, 9, 3, 3, stride=2, padding=1, dtype=dtype)
    name, blocks = next(
        (c["name"], c["blocks"])
        for c in explain(question, device="L4").candidates
        if "stem 64x32" in c["name"]
    )
    tile_p, tile_q = map(int, name.split()[3].split("x"))
    assert 1.5 * blocks < 3 * -(-shape.p // tile_p) * -(-shape.q // tile_q)
    assert torch.equal(run_simulated(problem, name, device="L4"), expected_rounded(problem))


@dtypes
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("shape", [shape for shape in STEMS if shape.p * shape.q * shape.k > 500], ids=str)
def test_the_error_stays_within_the_bound(
    run: Run, shape: ConvShape, dtype: torch.dtype, residual_order: str | None
) -> None:
    problem = random_problem(shape, dtype, Wanted("relu", residual_order=residual_order))
    expected = expected_exactly(problem)
    for layout in (contiguous, channels_last):
        error = relative_error(run(laid_out(problem, layout), "stem"), expected)
        assert error <= bound(dtype), f"relative error {error:.3g} exceeds {bound(dtype):.3g}"


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(run: Run, act: str, dtype: torch.dtype) -> None:
    wanted = Wanted(act, ACTIVATIONS[act], norm_dtype=dtype, residual_order="add_act", seed=1)
    problem = random_problem(STEMS[0], dtype, wanted)
    error = relative_error(run(problem, "stem"), expected_exactly(problem))
    assert error <= bound(dtype)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [STEMS[1], STEMS[2], STEMS[10]], ids=str)
def test_operands_in_any_layout(run: Run, shape: ConvShape, layout: Layout, dtype: torch.dtype) -> None:
    problem = integer_problem(shape, dtype, Wanted("relu", residual_order="add_act"))
    assert problem.residual is not None
    for given in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(residual=layout(problem.residual)),
        channels_last_but(problem, layout),
    ):
        assert torch.equal(run(given, "stem"), expected_rounded(given))


def channels_last_but(problem: Problem, layout: Layout) -> Problem:
    """A channels_last output with x in the layout."""
    return problem.replace(x=layout(problem.x), weight=channels_last(problem.weight))


ALMOST_UNITS = {
    "images": ((2, 3, 8, 16), (385, 128, 16, 1)),
    "channels": ((2, 3, 8, 16), (400, 129, 16, 1)),
    "rows": ((2, 3, 8, 16), (448, 144, 17, 1)),
    "columns": ((2, 3, 8, 16), (768, 256, 32, 2)),
    "rows of pixels": ((2, 3, 8, 16), (416, 1, 52, 3)),
    "pixels apart": ((2, 3, 8, 16), (768, 1, 96, 4)),
    "pixels that overlap": ((2, 3, 8, 16), (448, 2, 56, 3)),
    "one image": ((1, 3, 8, 16), (5, 128, 16, 1)),
    "one row": ((2, 3, 1, 16), (48, 16, 5, 1)),
    "one row of pixels": ((2, 3, 1, 16), (48, 1, 5, 3)),
}
"""Sizes and strides of x that allow wide loads but for one stride, some of which nothing steps along."""


def strided_problem(name: str, dtype: torch.dtype) -> Problem:
    size, strides = ALMOST_UNITS[name]
    shape = ConvShape(name, *size, 8, 1 if size[2] == 1 else 3, 3, "", (2, 2), (0, 1))
    memory = integer_problem(ConvShape("memory", 1, 1, 1, 2048, 1, 1, 1, ""), dtype).x.flatten()
    return integer_problem(shape, dtype).replace(x=memory.as_strided(size, strides))


@dtypes
@pytest.mark.parametrize("name", ALMOST_UNITS)
def test_strides_beside_those_of_wide_loads(run: Run, name: str, dtype: torch.dtype) -> None:
    problem = strided_problem(name, dtype)
    assert torch.equal(run(problem, "stem"), expected_rounded(problem))


@dtypes
@pytest.mark.parametrize("shape", [STEMS[0], STEMS[16]], ids=str)
def test_results_repeat_bit_for_bit_in_any_thread_order(
    run: Run, shape: ConvShape, dtype: torch.dtype
) -> None:
    problem = random_problem(shape, dtype, Wanted("silu", residual_order="add_act"))
    first = run(problem, "stem")
    for seed in (1, 2, 3):
        assert torch.equal(bits(run(problem, "stem", seed)), bits(first))


@dtypes
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_a_nan_or_infinity_in_x_reaches_only_the_outputs_that_read_it(
    shape: ConvShape, value: float, layout: Layout, dtype: torch.dtype
) -> None:
    """Words that are half lead or padding hold a neighbour's value, which no zero weight may meet."""
    problem = integer_problem(shape, dtype)
    problem.weight[problem.weight == 0] = 1
    for channel, place in ((0, 2), (shape.c - 1, 3)):
        x = problem.x.clone()
        x[0, channel, shape.h // place, shape.w // place] = value
        given = laid_out(problem.replace(x=x), layout)
        expected = expected_exactly(given)
        assert torch.equal(run_simulated(given).isfinite(), expected.isfinite())
        if value == float("inf"):
            # of one sign: that of the weight that the infinity met
            assert torch.equal(run_simulated(given).isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [STEMS[0], STEMS[4]], ids=str)
def test_a_nan_in_a_filter_reaches_only_its_channel(run: Run, shape: ConvShape) -> None:
    problem = integer_problem(shape, torch.float16)
    others = torch.arange(shape.k) != shape.k // 2
    expected = expected_rounded(problem)[:, others]
    problem.weight[~others] = float("nan")
    actual = run(problem, "stem")
    assert torch.equal(actual[:, others], expected)
    assert actual[:, ~others].isnan().all()


@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, misaligned], ids=lambda layout: layout.__name__
)
@pytest.mark.parametrize("shape", [STEMS[0], STEMS[2], STEMS[10]], ids=str)
def test_tf32_rounds_operands_once_and_nothing_else(shape: ConvShape, layout: Layout) -> None:
    """Simulated only: how tensor cores round their sums is not documented."""
    problem = random_problem(shape, torch.float32, Wanted("relu", residual_order="add_act"))
    rounded, truncated = (
        expected_exactly(problem.replace(x=to_tf32(problem.x), weight=to_tf32(problem.weight)))
        for to_tf32 in (rounded_to_tf32, truncated_to_tf32)
    )
    allowed = FLOAT32_ERROR * unit_roundoff(torch.float32)
    assert relative_error(truncated, rounded) > allowed, "truncation would pass"
    assert relative_error(run_simulated(laid_out(problem, layout)), rounded) <= allowed


@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, sliced_channels_last], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shape", STEMS, ids=str)
def test_sanitizers_accept_it(shape: ConvShape, layout: Layout) -> None:
    chance = random.Random(f"{shape} {layout}")
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted(residual_order="act_add"))
    given = laid_out(problem, layout)
    plan = chance.choice(stem_plans(given))
    assert torch.equal(run_simulated(given, plan, sanitized=True), expected_rounded(problem)), plan


def read_layers() -> list[dict[str, str]]:
    with open(LAYERS, newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["cin"]) <= 4 and row["groups"] == "1"]


def problem_of(row: dict[str, str], batch: int, dtype: torch.dtype) -> ConvProblem:
    cin, h, w, cout, r, s = (int(row[key]) for key in ("cin", "h", "w", "cout", "kh", "kw"))
    stride, padding, dilation = (
        (int(row[f"{key}_h"]), int(row[f"{key}_w"])) for key in ("stride", "pad", "dil")
    )
    return ConvProblem(
        batch, cin, h, w, cout, r, s, stride=stride, padding=padding, dilation=dilation, dtype=dtype
    )


@pytest.mark.parametrize("batch", [1, 8, 128])
def test_no_real_layer_of_few_channels_runs_on_cuda_cores(batch: int) -> None:
    layers = read_layers()
    assert len(layers) > 80
    for row in layers:
        explanation = explain(problem_of(row, batch, torch.float16))
        assert explanation.kernel != "direct", row
        if row["cin"] == "3":
            assert explanation.kernel == "stem", row


@pytest.mark.parametrize("device", ["A100", "L4", "RTX 4090", "H100", "H200", "B200"])
@dtypes
def test_every_device_has_memory_for_every_real_stem(device: str, dtype: torch.dtype) -> None:
    for row in read_layers():
        candidates = explain(problem_of(row, 8, dtype), device=device).candidates
        assert any(c["kernel"] == "stem" and not c["illegal"] for c in candidates), row


def illegal(problem: ConvProblem, **options: Any) -> str:
    """Why no tile of the kernel takes the problem."""
    reasons = {c["illegal"] for c in explain(problem, **options).candidates if c["kernel"] == "stem"}
    assert all(reasons), "some tile takes it"
    return reasons.pop()


def test_why_the_kernel_is_out() -> None:
    assert "2 groups, at most 1 groups" in illegal(ConvProblem(8, 4, 28, 28, 8, 3, 3, groups=2))
    assert "5 channels, at most 4 channels" in illegal(ConvProblem(8, 5, 28, 28, 8, 3, 3))
    assert "shared memory" in illegal(ConvProblem(1, 3, 8, 3000, 8, 1, 2500))
    assert "rows or columns" in illegal(ConvProblem(1, 3, 1 << 30, 4, 8, 3, 3, padding=1))
    assert "tiles" in illegal(ConvProblem(1 << 10, 3, 1 << 11, 1 << 11, 8, 1, 1))


def test_exact_float32_is_for_other_kernels() -> None:
    problem = ConvProblem(8, 3, 64, 64, 8, 3, 3, dtype=torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert "tf32" in illegal(problem)


def test_channels_that_nobody_has_are_for_direct() -> None:
    half = torch.zeros((), dtype=torch.float16)
    plans = list_plans(half.expand(1, 0, 4, 4), half.expand(8, 0, 1, 1))
    assert plans
    assert all(plan.startswith("direct") for plan in plans)


def test_plain_images_are_not_copied_for_a_channels_last_network() -> None:
    x = torch.zeros(8, 3, 224, 224).half()
    module = fused_cna.ConvNormAct(3, 64, 7, 2, 3).half().eval().to(memory_format=torch.channels_last)
    explanation = explain(module, x)
    assert explanation.kernel == "stem"
    assert not explanation.candidates[0]["convert_x"]
    assert not explanation.notes


def test_the_name_says_how_the_problem_is_cut() -> None:
    name = explain(ConvProblem(8, 3, 224, 224, 64, 7, 7, stride=2, padding=3)).candidates[0]["name"]
    kernel, tile, _, pixels, _, filter_rows = name.split()
    assert kernel == "stem"
    m, n, k = map(int, tile.split("x"))
    assert (n, k) == (64, 16)
    p, q = map(int, pixels.split("x"))
    assert m // 2 < p * q <= m
    assert filter_rows == "7"
