"""The operator on a CPU up to its launch, which bench/overhead.py times."""

from __future__ import annotations

import pytest
import torch

from fused_cna import _extension, ops
from tests.reference import Wanted, random_problem
from tests.shapes import SHAPES, ConvShape, shape_named

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="the extension has the dry run")


@pytest.mark.parametrize("dtype", ops.FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_problem_comes_to_its_launch(shape: ConvShape, dtype: torch.dtype) -> None:
    arguments = random_problem(shape, dtype, Wanted("relu", residual_order="add_act")).operator_arguments()
    expected = ops._empty_output(*arguments[:2], ops.check_arguments(*arguments))
    y = torch.ops.fused_cna._dry_run(*arguments)
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
    assert len(torch.ops.fused_cna._host_stages(*arguments, 2)) == 5


def test_it_refuses_and_differentiates_as_the_operator_does() -> None:
    problem = random_problem(shape_named("3x3"), torch.float32, Wanted("relu"))
    with pytest.raises(RuntimeError, match="non-positive groups"):
        torch.ops.fused_cna._dry_run(*problem.replace(groups=0).operator_arguments())
    with pytest.raises(RuntimeError, match="repeats should be positive, but got 0"):
        torch.ops.fused_cna._host_stages(*problem.operator_arguments(), 0)
    wanting = problem.replace(weight=problem.weight.clone().requires_grad_())
    assert torch.ops.fused_cna._dry_run(*wanting.operator_arguments()).requires_grad
    with torch.no_grad():
        assert not torch.ops.fused_cna._dry_run(*wanting.operator_arguments()).requires_grad
