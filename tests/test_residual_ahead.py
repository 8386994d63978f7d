"""The residual that kernels copy several turns ahead: however it lies, and where it is the output itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.layouts import Layout, batch_innermost, channels_last, contiguous, misaligned_channels_last
from tests.reference import DTYPES, Problem, Wanted, expected_rounded, integer_problem
from tests.shapes import ConvShape
from tests.simt import conv_norm_act, list_plans


def every_second_pixel_aligned(tensor: Tensor) -> Tensor:
    """Channels last, with every second pixel on a 16-byte boundary and the others between two."""
    n, c, h, w = tensor.shape
    pitch = -(-c * tensor.element_size() // 16) * 16 + 8
    storage = torch.full((n, h, w, pitch // tensor.element_size()), torch.nan, dtype=tensor.dtype)
    return storage[..., :c].permute(0, 3, 1, 2).copy_(tensor)


LAYOUTS: tuple[Layout, ...] = (
    channels_last,
    every_second_pixel_aligned,
    misaligned_channels_last,
    contiguous,
    batch_innermost,
)

# Rows that end within a tile, and columns that end within eight channels or with them.
SHORT = ConvShape("short", 2, 32, 13, 11, 72, 1, 1, "the residual is under way beside the operands")
LONG = ConvShape("long", 1, 64, 9, 13, 68, 3, 3, "the residual comes behind the operands", padding=(1, 1))

every_case = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", [SHORT, LONG], ids=str)


def make(shape: ConvShape, dtype: torch.dtype, order: str = "add_act") -> Problem:
    problem = integer_problem(shape, dtype, Wanted("relu", residual_order=order))
    return problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))


def plans(problem: Problem) -> list[str]:
    """Each tile of the implicit GEMM and of `direct` once, and one of them split."""
    options = {name: getattr(problem, name) for name in ("stride", "padding", "dilation", "groups")}
    names = list_plans(problem.x, problem.weight, **options, allow_tf32=True)
    names += list_plans(problem.x, problem.weight, **options, allow_tf32=False)
    tiles = {
        " ".join(name.split()[:2]): name for name in reversed(names) if "gemm" in name or "direct" in name
    }
    split = [name for name in names if " split 2 " in name][:1]
    assert len(tiles) >= 12
    return [*tiles, *split]


def run(problem: Problem, plan: str, **extra: object) -> Tensor:
    return problem.call(conv_norm_act, plan=plan, allow_tf32="sm80" in plan, **extra)


@every_shape
@every_case
def test_any_layout_of_the_residual_is_added(shape: ConvShape, dtype: torch.dtype) -> None:
    for order, layouts in (("add_act", LAYOUTS), ("act_add", LAYOUTS[:1])):
        problem = make(shape, dtype, order)
        expected = expected_rounded(problem)
        for layout in layouts:
            given = problem.replace(residual=layout(problem.residual))
            for plan in plans(problem):
                assert torch.equal(run(given, plan), expected), f"{plan} {order} {layout.__name__}"


@every_shape
@every_case
def test_the_residual_may_be_the_output_itself(shape: ConvShape, dtype: torch.dtype) -> None:
    problem = make(shape, dtype)
    expected = expected_rounded(problem)
    for plan in plans(problem):
        out = every_second_pixel_aligned(problem.residual)
        assert torch.equal(run(problem.replace(residual=out), plan, out=out), expected), plan


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: layout.__name__)
def test_nothing_beside_the_residual_is_read(layout: Layout) -> None:
    problem = make(SHORT, torch.float16)
    given = problem.replace(residual=layout(problem.residual))
    assert torch.equal(run(given, "implicit_gemm_sm80 64x64x32", sanitized=True), expected_rounded(problem))
