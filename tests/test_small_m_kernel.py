"""The kernel for few output pixels: every plan bit for bit, its error, any layout, and when it is chosen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fused_cna
from fused_cna import ConvProblem, explain
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, channels_last, odd_unit_strides
from tests.plans import plan_names
from tests.reference import (
    ACTIVATIONS,
    DEFAULT,
    DTYPES,
    NORM_PARTS,
    Problem,
    Wanted,
    error_bound,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
)
from tests.shapes import SHAPES, ConvShape
from tests.test_gemm_kernels import run_on_gpu, run_simulated

MOST_ROWS = 256
"""More output pixels than this it refuses."""

FEW_PIXELS = (
    ConvShape("squeeze", 1, 480, 1, 1, 20, 1, 1, "60 16-bit chunks: not a power of two, and K has a tail"),
    ConvShape("excite", 2, 24, 1, 1, 200, 1, 1, "3 chunks for teams of 4 lanes, two rows of four"),
    ConvShape("deep", 3, 2080, 1, 1, 3, 1, 1, "K = 3: every warp of a block on one reduction, several steps"),
    ConvShape("one_chunk", 5, 8, 1, 1, 70, 1, 1, "a single 16-bit chunk: teams of one lane"),
    ConvShape("row_tiles", 19, 72, 1, 1, 40, 1, 1, "rows in three tiles of 8, the last with 3"),
    ConvShape("pixels", 1, 64, 4, 4, 24, 1, 1, "16 pixels of one image"),
    ConvShape("strided_pixels", 2, 32, 5, 3, 24, 1, 1, "1x1 that skips pixels", (2, 2)),
    ConvShape("chunks_of_8", 2, 20, 1, 1, 33, 1, 1, "8-byte loads in 16-bit types, half a chunk at the end"),
    ConvShape("chunks_of_4", 9, 38, 1, 1, 18, 1, 1, "4-byte loads in 16-bit types, with a tail"),
    ConvShape("odd", 4, 47, 1, 1, 19, 1, 1, "odd channel counts: value by value"),
    ConvShape("one_channel", 2, 1, 1, 1, 25, 1, 1, "C = 1"),
    ConvShape("one_filter", 6, 100, 1, 1, 1, 1, 1, "K = 1"),
    ConvShape("full_window", 2, 32, 5, 4, 18, 5, 4, "a filter as large as the image"),
    ConvShape("border", 1, 24, 4, 4, 10, 3, 3, "16 pixels, most windows over the border", padding=(1, 1)),
    ConvShape("middle_tap", 3, 16, 1, 1, 12, 3, 3, "3x3 on one pixel: the rest is padding", padding=(1, 1)),
    ConvShape(
        "padded_1x1", 1, 16, 2, 2, 9, 1, 1, "a padded 1x1 filter: whole windows of padding", (2, 3), (1, 2)
    ),
    ConvShape(
        "everything",
        2,
        24,
        9,
        8,
        12,
        3,
        2,
        "stride, dilation, groups, four pads",
        (4, 3),
        (0, 2, 1, 0),
        (2, 3),
        3,
    ),
    ConvShape(
        "odd_groups", 2, 15, 3, 3, 35, 2, 2, "five groups of 3 to 7 channels", (1, 1), (0, 0), (1, 1), 5
    ),
    ConvShape("depthwise", 1, 10, 3, 3, 20, 3, 3, "depthwise with multiplier 2", groups=10),
)

Run = Callable[..., Tensor]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
few_pixels = pytest.mark.parametrize("shape", FEW_PIXELS, ids=str)


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a plan, simulated and real."""
    if request.param == "simt":
        yield run_simulated
        return
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    yield run_on_gpu


def plans_of(problem: Problem) -> list[str]:
    return plan_names(problem, "small_m")


def one_of_each_kind(problem: Problem) -> list[str]:
    """For each instantiation the plans with the fewest and with the most lanes."""
    by_kind: dict[tuple[str, ...], list[str]] = {}
    for plan in plans_of(problem):
        _, tile, _, _, *rest = plan.split()
        by_kind.setdefault((tile.partition("x")[0], *rest), []).append(plan)
    ends = ((min(alike, key=lanes), max(alike, key=lanes)) for alike in by_kind.values())
    return [plan for both in ends for plan in dict.fromkeys(both)]


def lanes(plan: str) -> int:
    return int(plan.split()[3])


def dense(problem: Problem) -> Problem:
    return problem.map(lambda tensor: channels_last(tensor) if tensor.dim() == 4 else tensor)


@dtypes
@few_pixels
def test_every_plan_is_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    wanted = Wanted(act=chance.choice(("identity", "relu6")), residual_order=chance.choice((None, "act_add")))
    given = integer_problem(shape, dtype, wanted)
    expected = expected_rounded(given)
    for problem in (given, dense(given)):
        plans = plans_of(problem)
        assert plans
        for plan in plans:
            assert torch.equal(run_simulated(problem, plan, chance.randrange(1000)), expected), plan


def test_the_shapes_reach_every_instantiation() -> None:
    reached = set()
    for dtype in DTYPES:
        for shape in FEW_PIXELS:
            for plan in plans_of(dense(integer_problem(shape, dtype))):
                _, tile, _, _, *rest = plan.split()
                reached.add((dtype, tile.partition("x")[0], *rest))
    accesses = {torch.float32: (16, 8, 4), torch.float16: (16, 8, 4, 2), torch.bfloat16: (16, 8, 4, 2)}
    expected = {
        (dtype, rows, "plain", f"{access}-byte")
        for dtype in DTYPES
        for rows in ("1", "4", "8")
        for access in accesses[dtype]
    }
    assert reached == expected | {(dtype, rows, "pointwise", "16-byte") for dtype in DTYPES for rows in "148"}


def test_the_shapes_reach_every_width_of_a_team() -> None:
    reached = {
        lanes(plan) for shape in FEW_PIXELS for plan in plans_of(integer_problem(shape, torch.float16))
    }
    assert reached == {1, 2, 4, 8, 16, 32, 64, 128}


@dtypes
@pytest.mark.parametrize(
    "shape", [shape for shape in SHAPES if 0 < shape.n * shape.p * shape.q <= MOST_ROWS], ids=str
)
def test_the_shapes_of_all_kernels_are_exact(run: Run, shape: ConvShape, dtype: torch.dtype) -> None:
    chance = random.Random(f"{shape} {dtype}")
    given = integer_problem(shape, dtype, Wanted("leaky_relu", (0.125,), residual_order="add_act"))
    for problem in (given, dense(given)):
        for plan in {"small_m", chance.choice(plans_of(problem))}:
            assert torch.equal(run(problem, plan), expected_rounded(problem)), plan


@dtypes
@pytest.mark.parametrize("n", range(1, 18))
def test_any_number_of_rows_is_exact(run: Run, n: int, dtype: torch.dtype) -> None:
    shape = ConvShape(f"batch_{n}", n, 40, 1, 1, 12, 1, 1, "rows of every tile, whole and not")
    problem = integer_problem(shape, dtype, Wanted(residual_order="add_act"))
    for plan in one_of_each_kind(problem):
        assert torch.equal(run(problem, plan), expected_rounded(problem)), plan


def random_few(shape: ConvShape, dtype: torch.dtype, wanted: Wanted = DEFAULT) -> Problem:
    """Half the mean: that of a single pixel is its very sum, of which only rounding would be left."""
    problem = random_problem(shape, dtype, wanted)
    assert problem.running_mean is not None
    return problem.replace(running_mean=problem.running_mean / 2)


def check_error(run: Run, problem: Problem, plan: str = "small_m", expected: Tensor | None = None) -> None:
    actual = run(problem, plan)
    assert actual.dtype == problem.x.dtype
    error = relative_error(actual, expected_exactly(problem) if expected is None else expected)
    allowed = error_bound(problem.x.dtype)
    assert error <= allowed, f"{plan}: relative error {error:.3g} exceeds {allowed:.3g}"


# The few outputs of the others may all happen to be small differences of large sums.
@dtypes
@pytest.mark.parametrize(
    "shape", [shape for shape in FEW_PIXELS if math.prod(shape.output_size) >= 20], ids=str
)
def test_the_error_stays_within_the_bound(run: Run, shape: ConvShape, dtype: torch.dtype) -> None:
    given = random_few(shape, dtype, Wanted("silu", residual_order="add_act"))
    expected = expected_exactly(given)
    for problem in (given, dense(given)):
        for plan in one_of_each_kind(problem):
            check_error(run, problem, plan, expected)


def test_long_reductions_are_summed_in_chunks(run: Run) -> None:
    """9,216 products by one warp and by four: one running sum would have several times the error."""
    shape = ConvShape("long", 2, 1024, 3, 3, 32, 3, 3, "a head over a 3x3 image")
    problem = dense(random_few(shape, torch.float32))
    for plan in one_of_each_kind(problem):
        check_error(run, problem, plan)


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(run: Run, act: str, dtype: torch.dtype) -> None:
    for order in (None, "add_act", "act_add"):
        check_error(
            run, random_problem(FEW_PIXELS[4], dtype, Wanted(act, ACTIVATIONS[act], residual_order=order))
        )


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("norm", NORM_PARTS)
def test_every_combination_of_norm_parameters(run: Run, norm: str, bias: bool, dtype: torch.dtype) -> None:
    for norm_dtype in {torch.float32, dtype}:
        problem = integer_problem(FEW_PIXELS[1], dtype, Wanted(norm=norm, bias=bias, norm_dtype=norm_dtype))
        assert torch.equal(run(problem, "small_m"), expected_rounded(problem))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["excite", "pixels", "border", "odd_groups"])
def test_operands_in_any_layout(run: Run, name: str, layout: Layout, dtype: torch.dtype) -> None:
    (shape,) = (shape for shape in FEW_PIXELS if shape.name == name)
    problem = dense(integer_problem(shape, dtype, Wanted(residual_order="add_act")))
    assert problem.residual is not None
    for changed in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(residual=layout(problem.residual)),
        problem.map(lambda tensor: layout(tensor) if tensor.dim() == 4 else tensor),
    ):
        for plan in one_of_each_kind(changed):
            assert torch.equal(run(changed, plan), expected_rounded(changed)), plan


@dtypes
@pytest.mark.parametrize("name", ["excite", "odd", "one_channel", "one_filter", "middle_tap"])
def test_strides_of_single_elements_are_never_taken(run: Run, name: str, dtype: torch.dtype) -> None:
    (shape,) = (shape for shape in FEW_PIXELS if shape.name == name)
    problem = integer_problem(shape, dtype)
    odd = problem.replace(x=odd_unit_strides(problem.x, 7), weight=odd_unit_strides(problem.weight, 11))
    for plan in one_of_each_kind(odd):
        assert torch.equal(run(odd, plan), expected_rounded(problem)), plan


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["row_tiles", "odd", "border", "odd_groups"])
def test_a_nan_or_infinity_in_x_reaches_only_the_outputs_that_read_it(
    run: Run, name: str, value: float
) -> None:
    (shape,) = (shape for shape in FEW_PIXELS if shape.name == name)
    problem = integer_problem(shape, torch.float32)
    problem.x[0, -1, shape.h // 2, shape.w // 2] = value
    expected = expected_exactly(problem)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()
    for plan in one_of_each_kind(problem):
        assert torch.equal(run(problem, plan).isfinite(), expected.isfinite()), plan


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["row_tiles", "odd", "border", "everything"])
def test_a_nan_or_infinity_in_a_filter_reaches_only_its_channel(run: Run, name: str, value: float) -> None:
    (shape,) = (shape for shape in FEW_PIXELS if shape.name == name)
    problem = integer_problem(shape, torch.float32)
    others = torch.arange(shape.k) != shape.k // 2
    expected = expected_rounded(problem)[:, others]
    problem.weight[~others] = value
    for plan in one_of_each_kind(problem):
        actual = run(problem, plan)
        assert torch.equal(actual[:, others], expected), plan
        assert not actual[:, ~others].isfinite().any(), plan


@dtypes
@pytest.mark.parametrize("shape", FEW_PIXELS[:3], ids=str)
def test_every_width_of_a_team_repeats_bit_for_bit(run: Run, shape: ConvShape, dtype: torch.dtype) -> None:
    problem = random_problem(shape, dtype, Wanted("silu"))
    by_lanes = {lanes(plan): plan for plan in plans_of(problem)}
    assert len(by_lanes) > 2
    for plan in by_lanes.values():
        first = run(problem, plan)
        for seed in (1, 2, 3):
            again = run(problem, plan, seed)
            assert torch.equal(again.flatten().view(torch.int16), first.flatten().view(torch.int16)), plan


@few_pixels
def test_sanitizers_accept_it(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted(residual_order="act_add"))
    given = chance.choice((problem, dense(problem)))
    for plan in chance.sample(plans_of(given), 2):
        result = problem.call(run_sanitized, plan=plan)
        assert torch.equal(result, expected_rounded(problem)), plan


def run_sanitized(*arguments: object, **keywords: object) -> Tensor:
    from tests.simt import conv_norm_act

    return conv_norm_act(*arguments, **keywords, sanitized=True)


SQUEEZE_EXCITE = (
    (64, 1024),
    (1024, 64),
    (40, 960),
    (960, 40),
    (96, 2304),
    (2304, 96),
    (20, 480),
    (240, 10),
    (8, 32),
)
"""Channels in and out of real squeeze-excite layers, most used ones first."""


@pytest.mark.parametrize("device", ["A100", "L4", "H100", "B200"])
@pytest.mark.parametrize("n", [1, 8])
def test_squeeze_excite_layers_of_small_batches_run_on_it(n: int, device: str) -> None:
    for c, k in SQUEEZE_EXCITE:
        chosen = explain(ConvProblem(n, c, 1, 1, k, 1, 1), device=device).candidates[0]
        assert chosen["kernel"] == "small_m", (c, k, chosen["name"])
        assert "copy" not in chosen["name"]
        assert chosen["workspace_bytes"] == 0


def test_wide_layers_of_large_batches_run_on_tensor_cores() -> None:
    for c, k in ((1024, 1024), (2048, 1000), (512, 2048)):
        for n in (64, 128):
            assert explain(ConvProblem(n, c, 1, 1, k, 1, 1)).kernel == "implicit_gemm_sm80", (n, c, k)
    assert explain(ConvProblem(32, 2048, 1, 1, 1000, 1, 1)).kernel == "implicit_gemm_sm80"
    assert explain(ConvProblem(1, 512, 7, 7, 512, 3, 3, padding=1)).kernel == "implicit_gemm_sm80"


def test_heads_over_a_whole_image_run_on_it() -> None:
    chosen = explain(ConvProblem(1, 512, 7, 7, 4096, 7, 7)).candidates[0]
    assert (chosen["kernel"], chosen["rows"], chosen["access_bytes"]) == ("small_m", "plain", 16)
    assert chosen["bytes_us"] > chosen["latency_us"], "bound by the read of the weight"


def test_deep_reductions_use_every_warp_of_a_block() -> None:
    chosen = explain(ConvProblem(1, 3072, 1, 1, 8, 1, 1)).candidates[0]
    assert (chosen["kernel"], chosen["lanes"]) == ("small_m", 128)
    assert explain(ConvProblem(1, 8, 1, 1, 32, 1, 1)).candidates[0]["lanes"] == 1


def test_few_channels_share_a_warp() -> None:
    chosen = explain(ConvProblem(1, 64, 1, 1, 1024, 1, 1)).candidates[0]
    assert chosen["kernel"] == "small_m"
    assert chosen["lanes"] <= 8, "64 channels are 8 chunks"
    assert chosen["tile"][1] >= 128 // chosen["lanes"] * 2


def test_exact_float32_is_no_obstacle() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        chosen = explain(ConvProblem(8, 960, 1, 1, 40, 1, 1, dtype=torch.float32))
    assert chosen.kernel == "small_m"


def test_nchw_is_read_as_it_lies_where_a_copy_costs_more() -> None:
    small = explain(ConvProblem(1, 64, 4, 4, 128, 1, 1, channels_last=False)).candidates[0]
    assert (small["kernel"], small["access_bytes"]) == ("small_m", 2)
    assert "copy" not in small["name"]
    wide = explain(ConvProblem(1, 512, 7, 7, 4096, 7, 7, channels_last=False))
    (first, *_) = (c for c in wide.candidates if c["kernel"] == "small_m")
    assert first["convert_weight"], "a sector for each value would cost more than the copy"


def test_why_it_is_out() -> None:
    (reason,) = {
        c["illegal"]
        for c in explain(ConvProblem(MOST_ROWS + 1, 64, 1, 1, 64, 1, 1)).candidates
        if c["kernel"] == "small_m"
    }
    assert reason == f"output pixels number {MOST_ROWS + 1}, at most {MOST_ROWS}"
    assert any(
        c["kernel"] == "small_m" and not c["illegal"]
        for c in explain(ConvProblem(MOST_ROWS, 64, 1, 1, 64, 1, 1)).candidates
    )


def test_it_never_needs_memory_of_its_own_unless_a_copy_is_faster() -> None:
    for channels_last_given in (True, False):
        problem = ConvProblem(1, 40, 4, 4, 24, 3, 3, padding=1, channels_last=channels_last_given)
        own = [c for c in explain(problem).candidates if c["kernel"] == "small_m"]
        assert any(not (c["convert_x"] or c["convert_weight"]) for c in own)
        assert all(c["workspace_bytes"] == 0 for c in own)
