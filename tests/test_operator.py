"""The operator and its front on the CPU: results, the front's conveniences, gradients, autocast."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_cna
from tests.reference import (
    ACTIVATIONS,
    NORM_PARTS,
    Problem,
    Wanted,
    expected_exactly,
    expected_rounded,
    integer_problem,
    library_bound,
    random_problem,
    relative_error,
    three_steps,
    three_steps_error,
)
from tests.shapes import SHAPES, ConvShape, shape_named

operator = torch.ops.fused_cna.conv_norm_act

SCHEMA = (
    "fused_cna::conv_norm_act(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? running_mean, Tensor? running_var, float eps, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, str act, float[] act_params, Tensor? residual, str residual_order) "
    "-> Tensor"
)

SOME_PROBLEMS = {
    "plain": random_problem(shape_named("3x3"), torch.float32, Wanted(norm="none", bias=False)),
    "whole": random_problem(
        shape_named("groups_odd"), torch.float32, Wanted("leaky_relu", (0.1,), residual_order="add_act")
    ),
    "act_add": random_problem(
        shape_named("3x3_stride2"), torch.float32, Wanted("silu", residual_order="act_add")
    ),
    "four_pads": random_problem(
        shape_named("padding_asymmetric"), torch.float32, Wanted("gelu", norm="no_affine")
    ),
    "empty": random_problem(shape_named("empty_batch"), torch.float32, Wanted("relu")),
}
some_problems = pytest.mark.parametrize("problem", SOME_PROBLEMS.values(), ids=SOME_PROBLEMS)

run_both = pytest.mark.parametrize(
    "run",
    [
        lambda problem: problem.call(fused_cna.conv_norm_act),
        lambda problem: operator(*problem.operator_arguments()),
    ],
    ids=["front", "operator"],
)


def test_schema() -> None:
    assert str(operator.default._schema) == SCHEMA


def test_signature_of_the_front() -> None:
    expected = (
        "bias=None, *, norm_weight=None, norm_bias=None, running_mean=None, running_var=None, eps=1e-05, "
        "stride=1, padding=0, dilation=1, groups=1, act='identity', act_params=(), residual=None, "
        "residual_order='add_act', out=None"
    )
    parameters = inspect.signature(fused_cna.conv_norm_act).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"(x, weight, {expected})"


@run_both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula(run: Callable[[Problem], Tensor], shape: ConvShape) -> None:
    """In float32 by integers, whose sums are exact in any order; 16-bit types round in each of the steps."""
    wanted = Wanted("relu", residual_order="add_act")
    problem = integer_problem(shape, torch.float32, wanted)
    assert torch.equal(run(problem), expected_rounded(problem))
    for dtype in (torch.float16, torch.bfloat16):
        problem = random_problem(shape, dtype, wanted)
        actual = run(problem)
        assert actual.dtype == dtype
        assert relative_error(actual, expected_exactly(problem)) <= library_bound(
            dtype, three_steps_error(problem)
        )


@run_both
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(run: Callable[[Problem], Tensor], act: str, residual_order: str | None) -> None:
    wanted = Wanted(act, ACTIVATIONS[act], residual_order=residual_order, norm_dtype=torch.float64)
    problem = random_problem(shape_named("groups_wide"), torch.float64, wanted)
    assert relative_error(run(problem), expected_exactly(problem)) < 1e-14


@run_both
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("norm", NORM_PARTS)
def test_norm_parameters(run: Callable[[Problem], Tensor], norm: str, bias: bool) -> None:
    problem = integer_problem(shape_named("groups_odd"), torch.float64, Wanted("relu", norm=norm, bias=bias))
    problem = problem.map(Tensor.double).replace(eps=0.25)
    assert relative_error(run(problem), expected_exactly(problem)) < 1e-14


@run_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("norm_in_storage_dtype", [False, True], ids=["norm_float32", "norm_storage"])
@pytest.mark.parametrize("norm", [name for name in NORM_PARTS if name != "none"])
def test_norm_vectors_in_float32_or_the_storage_dtype(
    run: Callable[[Problem], Tensor], norm: str, norm_in_storage_dtype: bool, dtype: torch.dtype
) -> None:
    norm_dtype = dtype if norm_in_storage_dtype else torch.float32
    problem = random_problem(
        shape_named("groups_wide"), dtype, Wanted("relu", norm=norm, norm_dtype=norm_dtype)
    )
    actual = run(problem)
    assert actual.dtype == dtype
    assert relative_error(actual, expected_exactly(problem)) <= library_bound(
        dtype, three_steps_error(problem)
    )


@some_problems
def test_nothing_is_changed(problem: Problem) -> None:
    before = problem.map(Tensor.clone)
    operator(*problem.operator_arguments())
    problem.call(fused_cna.conv_norm_act)
    for old, new in zip(before.operator_arguments(), problem.operator_arguments(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


def test_ints_stand_for_pairs() -> None:
    x, weight = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    actual = fused_cna.conv_norm_act(x, weight, stride=2, padding=3, dilation=2)
    expected = F.conv2d(x, weight, stride=2, padding=3, dilation=2)
    torch.testing.assert_close(actual, expected)
    pairs = fused_cna.conv_norm_act(x, weight, stride=[2, 2], padding=(3, 3), dilation=torch.Size([2, 2]))
    four = fused_cna.conv_norm_act(x, weight, stride=(2,), padding=(3, 3, 3, 3), dilation=(2, 2))
    assert torch.equal(pairs, actual)
    torch.testing.assert_close(four, actual)


@pytest.mark.parametrize("dilation", [1, (2, 3)])
@pytest.mark.parametrize("filter_size", [(3, 3), (4, 2), (2, 5), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str, filter_size: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    x, weight, bias = torch.randn(2, 4, 13, 14), torch.randn(6, 2, *filter_size), torch.randn(6)
    actual = fused_cna.conv_norm_act(x, weight, bias, padding=padding, dilation=dilation, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that "same" with an even filter copies
        expected = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=2)
    torch.testing.assert_close(actual, expected)


def test_four_pads_are_top_bottom_left_right() -> None:
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 3, 3)
    actual = fused_cna.conv_norm_act(x, weight, padding=(0, 1, 2, 3))
    torch.testing.assert_close(actual, F.conv2d(F.pad(x, (2, 3, 0, 1)), weight))


@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
def test_the_front_takes_unbatched_images(residual_order: str | None) -> None:
    shape = ConvShape("single", 1, 4, 7, 6, 5, 3, 3, "unbatched", padding=(1, 1))
    problem = random_problem(shape, torch.float32, Wanted("silu", residual_order=residual_order))
    batched = problem.call(fused_cna.conv_norm_act)
    residual = None if problem.residual is None else problem.residual[0]
    actual = problem.replace(x=problem.x[0], residual=residual).call(fused_cna.conv_norm_act)
    assert actual.shape == (5, 7, 6)
    torch.testing.assert_close(actual, batched[0])


def test_default_act_params_are_those_of_the_modules() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    z = F.conv2d(x, weight)
    for act, params, function in (("leaky_relu", (0.01,), F.leaky_relu), ("elu", (1.0,), F.elu)):
        torch.testing.assert_close(
            fused_cna.conv_norm_act(x, weight, act=act, act_params=params), function(z), rtol=1e-5, atol=1e-6
        )


GRADIENT_PROBLEMS = {
    "plain": Wanted("tanh", norm="none"),
    "add_act": Wanted("silu", residual_order="add_act"),
    "act_add": Wanted("gelu", residual_order="act_add"),
    "no_affine": Wanted("leaky_relu", (0.1,), norm="no_affine", bias=False),
}
DIFFERENTIABLE = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")


def gradient_problem(
    wanted: Wanted, requiring: tuple[str, ...] = DIFFERENTIABLE
) -> tuple[Problem, list[str]]:
    shape = ConvShape(
        "gradients", 2, 4, 4, 5, 6, 3, 2, "small enough for gradcheck", (2, 1), (1, 0, 1, 2), (1, 1), 2
    )
    problem = random_problem(shape, torch.float64, wanted)
    problem = problem.map(lambda tensor: tensor.double())
    names = [name for name in requiring if getattr(problem, name) is not None]
    return problem.replace(**{name: getattr(problem, name).clone().requires_grad_() for name in names}), names


@run_both
@pytest.mark.parametrize("wanted", GRADIENT_PROBLEMS.values(), ids=GRADIENT_PROBLEMS)
def test_gradcheck(run: Callable[[Problem], Tensor], wanted: Wanted) -> None:
    problem, names = gradient_problem(wanted)

    def function(*tensors: Tensor) -> Tensor:
        return run(problem.replace(**dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, [getattr(problem, name) for name in names])


@run_both
@pytest.mark.parametrize("wanted", GRADIENT_PROBLEMS.values(), ids=GRADIENT_PROBLEMS)
def test_gradients_are_those_of_the_three_steps(run: Callable[[Problem], Tensor], wanted: Wanted) -> None:
    problem, names = gradient_problem(wanted)
    tensors = [getattr(problem, name) for name in names]
    expected = torch.autograd.grad(three_steps(problem).square().sum(), tensors)
    actual = torch.autograd.grad(run(problem).square().sum(), tensors)
    for name, mine, theirs in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@run_both
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_tensor_that_requires_a_gradient_is_enough(run: Callable[[Problem], Tensor], name: str) -> None:
    problem, _ = gradient_problem(GRADIENT_PROBLEMS["add_act"], (name,))
    actual = run(problem)
    assert actual.requires_grad
    (gradient,) = torch.autograd.grad(actual.sum(), [getattr(problem, name)])
    assert gradient.shape == getattr(problem, name).shape
    assert gradient.abs().max() > 0


@run_both
def test_no_gradient_is_recorded_where_none_is_wanted(run: Callable[[Problem], Tensor]) -> None:
    problem, _ = gradient_problem(GRADIENT_PROBLEMS["add_act"])
    expected = run(problem).detach()
    with torch.no_grad():
        actual = run(problem)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        actual = run(problem)
    assert actual.is_inference()
    torch.testing.assert_close(actual, expected)
    detached = run(problem.map(Tensor.detach))
    assert not detached.requires_grad


autocast_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


@autocast_dtypes
@pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])
def test_autocast_of_the_operator(dtype: torch.dtype, residual_order: str | None) -> None:
    wanted = Wanted("relu", residual_order=residual_order)
    problem = random_problem(shape_named("groups_wide"), torch.float32, wanted)
    with torch.autocast("cpu", dtype):
        actual = operator(*problem.operator_arguments())
        allowed = library_bound(dtype, three_steps_error(problem))
    assert actual.dtype == dtype
    assert relative_error(actual, expected_exactly(problem)) <= allowed


@autocast_dtypes
def test_autocast_of_the_front(dtype: torch.dtype) -> None:
    problem = random_problem(shape_named("groups_wide"), torch.float32, Wanted("relu"))
    with torch.autocast("cpu", dtype):
        actual = problem.call(fused_cna.conv_norm_act)
        allowed = library_bound(dtype, three_steps_error(problem))
    assert actual.dtype == dtype
    assert relative_error(actual, expected_exactly(problem)) <= allowed


def test_autocast_leaves_the_norm_vectors_alone() -> None:
    """Statistics that bfloat16 cannot hold: rounding them would move every result."""
    shape = ConvShape("offset", 1, 1, 1, 1, 1, 1, 1, "one product")
    mean = torch.tensor([256.75])
    problem = integer_problem(shape, torch.float32, Wanted(bias=False, norm="no_affine"))
    problem = problem.replace(
        x=torch.full((1, 1, 1, 1), 256.0),
        weight=torch.ones(1, 1, 1, 1),
        running_mean=mean,
        running_var=torch.ones(1),
    )
    with torch.autocast("cpu", torch.bfloat16):
        actual = operator(*problem.operator_arguments())
    assert actual.dtype == torch.bfloat16
    assert actual.item() == -0.75


def test_autocast_leaves_float64_alone() -> None:
    problem = random_problem(shape_named("3x3"), torch.float64, Wanted("relu", norm="none"))
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(*problem.operator_arguments()).dtype == torch.float64


@run_both
def test_gradients_under_autocast(run: Callable[[Problem], Tensor]) -> None:
    problem = random_problem(shape_named("groups_wide"), torch.float32, Wanted("relu"))

    def gradient(run: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
        weight = problem.weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            run(problem.replace(weight=weight)).float().square().sum().backward()
        assert weight.grad is not None
        return weight.grad

    actual, eager = gradient(run, problem), gradient(three_steps, problem)
    exact = gradient(three_steps, problem.map(Tensor.double))
    assert actual.dtype == torch.float32
    assert relative_error(actual, exact) <= 2 * relative_error(eager, exact)


def conv2d_info() -> object:
    """torch's own description of conv2d: samples and errors that its maintainers test it with."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [info for info in op_db if info.name == "nn.functional.conv2d"]
    return info


def test_conv2d_samples_of_torch() -> None:
    count = 0
    for dtype in (torch.float32, torch.float64):
        for sample in conv2d_info().sample_inputs("cpu", dtype):
            expected = F.conv2d(sample.input, *sample.args, **sample.kwargs)
            actual = fused_cna.conv_norm_act(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()
            count += 1
    assert count >= 20


def test_conv2d_error_inputs_of_torch() -> None:
    count = 0
    for error in conv2d_info().error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            fused_cna.conv_norm_act(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count >= 8
