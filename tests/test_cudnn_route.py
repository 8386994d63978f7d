"""cuDNN's route of the operator: its fold and its passes on the CPU, where torch's convolution stands in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_cna
from fused_cna import _extension, ops
from fused_cna.plan import planner
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, channels_last
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    EXACT_ACTIVATIONS,
    NORM_PARTS,
    Problem,
    Wanted,
    expected_exactly,
    expected_rounded,
    integer_problem,
    library_bound,
    random_problem,
    relative_error,
    three_steps_error,
)
from tests.shapes import SHAPES, ConvShape, shape_named

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=f"needs the extension: {_extension.unavailable_reason()}"
)


def on_cpu(problem: Problem) -> Tensor:
    result: Tensor = torch.ops.fused_cna._cudnn_route(*problem.operator_arguments())
    return result


def on_gpu(problem: Problem) -> Tensor:
    with fused_cna.forced_plan("cudnn"), torch.inference_mode():
        placed = problem.map(Tensor.cuda)
        result: Tensor = ops.operator(*placed.operator_arguments())
        return result.cpu()


@pytest.fixture(params=[on_cpu, pytest.param(on_gpu, marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Callable[[Problem], Tensor]:
    if request.param is on_gpu:
        needs_gpu()
    chosen: Callable[[Problem], Tensor] = request.param
    return chosen


Run = Callable[[Problem], Tensor]


def check(run: Run, problem: Problem) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = run(problem)
        like = ops.operator(*problem.operator_arguments())
        eager_error = three_steps_error(problem.map(Tensor.cuda) if run is on_gpu else problem)
    assert (actual.shape, actual.dtype, actual.stride()) == (like.shape, like.dtype, like.stride())
    # the folded weight and up to two passes after the convolution round once each
    assert relative_error(actual, expected_exactly(problem)) <= library_bound(like.dtype, eager_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(run: Run, shape: ConvShape, dtype: torch.dtype) -> None:
    if run is on_cpu and dtype == torch.float32:
        # sums of integers are exact, in whatever order this processor's library adds them
        problem = integer_problem(shape, dtype, Wanted("relu"))
        assert torch.equal(run(problem), expected_rounded(problem))
    else:
        check(run, random_problem(shape, dtype, Wanted("relu")))


@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_residual_orders(run: Run, act: str, residual_order: str | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wanted = Wanted(act, ACTIVATIONS[act], residual_order=residual_order)
        check(run, random_problem(shape_named("3x3"), dtype, wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORM_PARTS)
def test_norm_parameters(run: Run, norm: str, bias: bool) -> None:
    for dtype in DTYPES:
        for norm_dtype in (torch.float32, dtype):
            wanted = Wanted("silu", norm=norm, bias=bias, norm_dtype=norm_dtype)
            check(run, random_problem(shape_named("1x1"), dtype, wanted))


@pytest.mark.parametrize("act", EXACT_ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual_order", [None, "add_act"])
def test_integers_are_exact_in_float32(
    run: Run, act: tuple[str, tuple[float, ...]], residual_order: str | None
) -> None:
    problem = integer_problem(
        shape_named("3x3_stride2"), torch.float32, Wanted(*act, residual_order=residual_order)
    )
    assert torch.equal(run(problem), expected_rounded(problem))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_comes_out_in_the_operators(run: Run, layout: Layout) -> None:
    for name in ("3x3", "padding_asymmetric", "1x1"):
        problem = random_problem(shape_named(name), torch.float16, Wanted("relu", residual_order="add_act"))
        check(run, problem.replace(x=layout(problem.x)))
        check(run, problem.replace(weight=layout(problem.weight)))
        check(run, problem.replace(x=channels_last(problem.x), residual=layout(problem.residual)))


def test_nothing_is_changed_and_nothing_is_kept(run: Run) -> None:
    problem = random_problem(shape_named("3x3"), torch.float32, Wanted("relu", residual_order="act_add"))
    before = problem.map(Tensor.clone)
    first = run(problem)
    for name in ("x", "weight", "bias", "norm_weight", "running_mean", "running_var", "residual"):
        assert torch.equal(getattr(problem, name), getattr(before, name)), name
    problem.norm_weight.mul_(2)
    problem.weight.add_(0.1)
    assert not torch.equal(run(problem), first)
    check(run, problem)


def test_without_a_norm_the_weight_is_used_as_it_is() -> None:
    problem = random_problem(shape_named("1x1"), torch.bfloat16, Wanted("identity", norm="none"))
    plain = torch.conv2d(problem.x, problem.weight, problem.bias)
    assert torch.equal(on_cpu(problem), plain)


def test_bad_arguments_are_refused_as_everywhere() -> None:
    problem = random_problem(shape_named("3x3"), torch.float32)
    with pytest.raises(RuntimeError, match="residual should have the output's size"):
        on_cpu(problem.replace(residual=torch.zeros(1)))
    with pytest.raises(RuntimeError, match="unknown activation 'softmax'"):
        on_cpu(problem.replace(act="softmax"))


def test_it_is_a_plan_by_its_name_alone() -> None:
    question = planner().problem(fused_cna.ConvProblem(8, 64, 28, 28, 64, 3, 3).question())
    assert planner().find(question, "H100", "cudnn")["kernel"] == "cudnn"
    listed = planner().candidates(question, "H100")
    assert "cudnn" not in {c["kernel"] for c in listed}
    assert "cudnn" not in _extension.module().kernels()


def test_the_simulator_refuses_it() -> None:
    from tests.simt import conv_norm_act

    problem = random_problem(shape_named("3x3"), torch.float32)
    with pytest.raises(RuntimeError, match="cudnn failed: it is ATen's, which only the operator can call"):
        problem.call(conv_norm_act, plan="cudnn")


def passes(act: str, residual: str | None) -> int:
    problem = fused_cna.ConvProblem(8, 64, 28, 28, 64, 3, 3, act=act, residual=residual)
    return int(planner().problem(problem.question())["passes_after_cudnn"])


@pytest.mark.parametrize(
    ("act", "residual", "expected"),
    [
        ("relu", None, 0),
        ("relu", "add_act", 0),
        ("relu", "act_add", 2),
        ("identity", None, 0),
        ("identity", "add_act", 1),
        ("silu", None, 1),
        ("silu", "add_act", 2),
        ("silu", "act_add", 2),
    ],
)
def test_passes_behind_the_convolution(act: str, residual: str | None, expected: int) -> None:
    assert passes(act, residual) == expected
