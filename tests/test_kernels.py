"""What all kernels share, by whatever plan is chosen: activations, the fold, and an empty batch."""

from __future__ import annotations

import pytest
import torch

from tests.conformance import Subject
from tests.conftest import Backend
from tests.families import BY_NAME
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    Problem,
    Wanted,
    act_formula,
    expected_exactly,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import shape_named

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


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


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_eps_is_added_to_the_variance(kernels: Backend, eps: float) -> None:
    problem = random_problem(shape_named("groups_odd"), torch.float32)
    assert problem.running_var is not None
    problem = problem.replace(running_var=problem.running_var.clone(), eps=eps)
    problem.running_var[0] = 0
    Subject(kernels, BY_NAME["chosen"]).check_error(problem, [""])


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


@dtypes
def test_an_empty_batch_gives_an_empty_output(kernels: Backend, dtype: torch.dtype) -> None:
    problem = integer_problem(shape_named("empty_batch_groups"), dtype, Wanted(residual_order="act_add"))
    actual = kernels.run(kernels.place(problem))
    assert actual.shape == (0, 16, 3, 3)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
