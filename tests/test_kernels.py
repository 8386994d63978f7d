"""The kernels against the formula in float64: exact on integers, within the error bound on random inputs."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import Backend, Simulator
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    EXACT_ACTIVATIONS,
    NORM_PARTS,
    Problem,
    Wanted,
    act_formula,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import SHAPES, TELLING_SHAPES, ConvShape, shape_named

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
residual_orders = pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(kernels: Backend, shape: ConvShape, dtype: torch.dtype) -> None:
    kernels.check_exact(integer_problem(shape, dtype))


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_inputs_stay_within_the_error_bound(
    kernels: Backend, shape: ConvShape, dtype: torch.dtype
) -> None:
    kernels.check_error(random_problem(shape, dtype, Wanted("relu", residual_order="add_act")))


@dtypes
@residual_orders
@pytest.mark.parametrize(("act", "act_params"), EXACT_ACTIVATIONS, ids=[act for act, _ in EXACT_ACTIVATIONS])
@pytest.mark.parametrize("shape", TELLING_SHAPES, ids=str)
def test_integers_stay_exact_through_the_epilogue(
    kernels: Backend,
    shape: ConvShape,
    dtype: torch.dtype,
    act: str,
    act_params: tuple[float, ...],
    residual_order: str | None,
) -> None:
    kernels.check_exact(integer_problem(shape, dtype, Wanted(act, act_params, residual_order=residual_order)))


@dtypes
@residual_orders
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(kernels: Backend, act: str, dtype: torch.dtype, residual_order: str | None) -> None:
    wanted = Wanted(act, ACTIVATIONS[act], residual_order=residual_order, seed=1)
    kernels.check_error(random_problem(shape_named("many_pixels"), dtype, wanted))


def identity_convolution(values: torch.Tensor, act: str) -> Problem:
    """A 1x1 convolution that multiplies by one: `values` go through the activation and nothing else."""
    x = values.view(1, 1, 1, -1)
    weight = torch.ones(1, 1, 1, 1, dtype=values.dtype)
    return Problem(x, weight, act=act, act_params=ACTIVATIONS[act])


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_over_their_whole_range(kernels: Backend, act: str, dtype: torch.dtype) -> None:
    near, far = torch.linspace(-7, 7, 281), torch.tensor([10.0, 20, 60, 88, 89, 104, 1000, 60000])
    values = torch.cat([near, far, -far]).to(dtype)
    problem = identity_convolution(values, act)
    actual = kernels.run(kernels.place(problem)).cpu().double().flatten()
    expected = expected_exactly(problem).flatten()
    # 1 - tanh and its like cancel, so the float32 work is held to the argument and the store to the result
    allowed = 4 * 2.0**-24 * values.double().abs().clamp(min=1) + unit_roundoff(dtype) * expected.abs()
    # below the normal range of float16 the spacing is constant
    allowed += 2.0**-25 if dtype == torch.float16 else 0
    excess = ((actual - expected).abs() - allowed).nan_to_num(nan=float("inf"))
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"act({values[worst]}) is {actual[worst]} instead of {expected[worst]}"


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_pass_nan_on_and_take_infinity(kernels: Backend, act: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    actual = kernels.run(kernels.place(identity_convolution(values, act))).cpu().flatten()
    expected = act_formula(act, ACTIVATIONS[act], values.double())
    torch.testing.assert_close(actual.double(), expected, equal_nan=True, rtol=1e-6, atol=0)


@dtypes
@pytest.mark.parametrize("norm_in_storage_dtype", [False, True], ids=["norm_float32", "norm_storage"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("norm", NORM_PARTS)
@pytest.mark.parametrize("shape", [shape_named("tile_plus_one"), shape_named("groups_odd")], ids=str)
def test_every_combination_of_norm_parameters(
    kernels: Backend, shape: ConvShape, norm: str, bias: bool, norm_in_storage_dtype: bool, dtype: torch.dtype
) -> None:
    norm_dtype = dtype if norm_in_storage_dtype else torch.float32
    wanted = Wanted(norm=norm, bias=bias, norm_dtype=norm_dtype)
    kernels.check_exact(integer_problem(shape, dtype, wanted))
    kernels.check_error(random_problem(shape, dtype, wanted))


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_eps_is_added_to_the_variance(kernels: Backend, eps: float) -> None:
    problem = random_problem(shape_named("groups_odd"), torch.float32)
    assert problem.running_var is not None
    problem = problem.replace(running_var=problem.running_var.clone(), eps=eps)
    problem.running_var[0] = 0
    kernels.check_error(problem)


def test_the_fold_subtracts_before_it_scales(kernels: Backend) -> None:
    """Where the mean is a thousand standard deviations, acc * scale + shift would lose three digits."""
    generator = torch.Generator().manual_seed(0)
    x = 4096.0 + torch.randint(-8, 9, (1, 1, 9, 9), generator=generator)
    vectors = {
        "norm_weight": torch.rand(5, generator=generator) + 0.5,
        "norm_bias": torch.zeros(5),
        "running_mean": torch.full((5,), 4096.0),
        "running_var": torch.rand(5, generator=generator) * 9 + 10,
    }
    problem = Problem(x, torch.ones(5, 1, 1, 1), torch.zeros(5), **vectors)
    actual = kernels.run(kernels.place(problem))
    error = relative_error(actual, expected_exactly(problem)) / unit_roundoff(torch.float32)
    assert error < 4, f"{error:.3g} u"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
def test_results_are_rounded_once(kernels: Backend, dtype: torch.dtype, residual_order: str) -> None:
    """One rounding to nearest costs about 0.42 u in the mean square; a second one would make that 0.6."""
    problem = random_problem(
        shape_named("many_blocks"), dtype, Wanted("leaky_relu", (0.1,), residual_order=residual_order)
    )
    actual = kernels.run(kernels.place(problem))
    error = relative_error(actual, expected_exactly(problem)) / unit_roundoff(dtype)
    assert error < 0.45, f"{error:.3f} u"


@pytest.mark.parametrize("exponent", [-21, -16, 8, 10])
def test_float16_rounds_at_both_ends_of_its_range(kernels: Backend, exponent: int) -> None:
    """Subnormal results and overflow to infinity, as the formula rounded once gives them."""
    problem = integer_problem(shape_named("3x3"), torch.float16, Wanted("leaky_relu", (0.125,)))
    scale = torch.full_like(problem.norm_weight, 2.0**exponent)
    problem = problem.replace(norm_weight=scale, norm_bias=torch.zeros_like(scale))
    expected = expected_rounded(problem)
    assert expected.isinf().any() or (expected.abs() < 2.0**-14).any()
    kernels.check_exact(problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", TELLING_SHAPES, ids=str)
def test_a_nan_or_infinity_in_x_reaches_only_the_outputs_that_read_it(
    kernels: Backend, shape: ConvShape, value: float
) -> None:
    problem = integer_problem(shape, torch.float32)
    problem.x[0, -1, shape.h // 2, shape.w // 2] = value
    actual = kernels.run(kernels.place(problem)).cpu()
    expected = expected_exactly(problem)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()
    assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", TELLING_SHAPES, ids=str)
def test_a_nan_or_infinity_in_a_filter_reaches_only_its_channel(
    kernels: Backend, shape: ConvShape, value: float
) -> None:
    problem = integer_problem(shape, torch.float32)
    others = torch.arange(shape.k) != shape.k // 2
    expected = expected_rounded(problem)[:, others]
    problem.weight[~others] = value
    actual = kernels.run(kernels.place(problem)).cpu()
    assert torch.equal(actual[:, others], expected)
    assert not actual[:, ~others].isfinite().any()


@dtypes
def test_an_empty_batch_gives_an_empty_output(kernels: Backend, dtype: torch.dtype) -> None:
    problem = integer_problem(shape_named("empty_batch_groups"), dtype, Wanted(residual_order="act_add"))
    actual = kernels.run(kernels.place(problem))
    assert actual.shape == (0, 16, 3, 3)
    assert actual.dtype == dtype
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", TELLING_SHAPES, ids=str)
def test_results_repeat_bit_for_bit_in_any_thread_order(kernels: Backend, shape: ConvShape) -> None:
    problem = kernels.place(random_problem(shape, torch.float32, Wanted("silu", residual_order="add_act")))
    first = kernels.run(problem, **kernels.thread_order(0))
    for seed in (1, 2, 3):
        again = kernels.run(problem, **kernels.thread_order(seed))
        assert torch.equal(again.view(torch.int32), first.view(torch.int32))


TILES = {"direct": ("64x64x32", "128x8x32", "256x1x16")}
"""What the plan can choose from, kernel by kernel."""


@pytest.mark.parametrize("plan", [f"{kernel} {tile}" for kernel, tiles in TILES.items() for tile in tiles])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_takes_every_shape(shape: ConvShape, plan: str) -> None:
    """Whatever the plan prefers: on another device, or for a larger problem, it chooses otherwise."""
    problem = integer_problem(shape, torch.float16, Wanted("relu", residual_order="act_add"))
    assert torch.equal(Simulator().run(problem, plan=plan), expected_rounded(problem))


@pytest.mark.parametrize("kernel", TILES)
def test_no_tile_is_left_out(kernel: str) -> None:
    with pytest.raises(RuntimeError, match=f'no plan "{kernel} 1x2x3"') as caught:
        Simulator().run(integer_problem(shape_named("3x3"), torch.float32), plan=f"{kernel} 1x2x3")
    listed = re.findall(rf'"{kernel} (\d+x\d+x\d+)"', str(caught.value).partition("there are:")[2])
    assert sorted(listed) == sorted(TILES[kernel])
