"""Kernels on tensors in any layout: views, odd strides, far offsets; and the output's own layout."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.conformance import Subject
from tests.conftest import Backend
from tests.families import BY_NAME
from tests.layouts import LAYOUTS, Layout, channels_last, sliced
from tests.locks import locked
from tests.reference import Problem, Wanted, integer_problem
from tests.shapes import ConvShape, shape_named
from tests.simt.build import ROOT


def make(kernels: Backend, shape: ConvShape, dtype: torch.dtype = torch.float32) -> Problem:
    return kernels.place(integer_problem(shape, dtype, Wanted("relu", residual_order="add_act")))


def check(kernels: Backend, problem: Problem) -> None:
    """Runs what the plan chooses."""
    Subject(kernels, BY_NAME["chosen"]).check(problem, [""])


def test_vectors_that_are_expanded(kernels: Backend) -> None:
    problem = make(kernels, shape_named("groups_odd"))
    check(kernels, problem.map(lambda t: t[:1].expand(t.shape) if t.dim() == 1 else t))


class Expanse:
    """A float16 storage of more than 2^32 elements, of which only what is touched takes memory.

    Views start in its middle, so that an offset that wraps to a negative 32-bit number reads zeros instead of
    ending the process.
    """

    elements = 2**32 + 2**20

    def __init__(self, device: str) -> None:
        if device == "cpu":
            map_noreserve = 0x4000
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
            self.storage = torch.frombuffer(
                mmap.mmap(-1, 2 * self.elements, flags=flags), dtype=torch.float16
            )
        else:
            self.storage = torch.zeros(self.elements, dtype=torch.float16, device=device)

    def view_of(self, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        view = self.storage.as_strided(tensor.shape, strides, 2**31 + 2**12)
        return view.copy_(tensor)


FAR = 2**31 + 2**8


@pytest.fixture
def expanse(kernels: Backend) -> Iterator[Expanse]:
    if kernels.device == "cpu":
        yield Expanse("cpu")
        return
    # Eight gigabytes: not in several workers at a time, and not kept by torch afterwards.
    with locked(ROOT / "build" / "expanse.lock"):
        made = Expanse(kernels.device)
        yield made
        del made.storage
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("operand", "strides"),
    [
        ("x", (FAR, 16, 4, 1)),
        ("x", (1024, FAR, 4, 1)),
        ("x", (1024, 16, FAR // 3, 1)),
        ("x", (FAR, 1, 8, 2)),
        ("weight", (FAR // 2, 16, 3, 1)),
        ("weight", (1, 4, 48, FAR // 2)),
        ("residual", (FAR, 16, 4, 1)),
        ("residual", (64, 1024, 4, FAR // 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_offsets_beyond_32_bits(
    kernels: Backend, expanse: Expanse, operand: str, strides: tuple[int, ...]
) -> None:
    shape = ConvShape("far", 2, 2, 4, 4, 3, 3, 3, "offsets beyond 2^31 elements", padding=(1, 1))
    problem = make(kernels, shape, torch.float16)
    tensor = getattr(problem, operand)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    assert reach >= 2**31
    check(kernels, problem.replace(**{operand: expanse.view_of(tensor, strides)}))


@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_output_layout_is_that_of_conv2d(kernels: Backend, x_layout: Layout, weight_layout: Layout) -> None:
    for name in ("3x3_stride2", "1x1", "squeeze_excite", "one_channel", "filter_image"):
        problem = make(kernels, shape_named(name)).replace(residual=None)
        problem = problem.replace(x=x_layout(problem.x), weight=weight_layout(problem.weight))
        options = {key: getattr(problem, key) for key in ("stride", "padding", "dilation", "groups")}
        expected = torch.conv2d(problem.x, problem.weight, None, **options)
        actual = kernels.run(problem)
        assert actual.stride() == expected.stride(), name


def test_the_layout_of_the_residual_does_not_choose_the_output_layout(kernels: Backend) -> None:
    problem = make(kernels, shape_named("groups_narrow"))
    assert problem.residual is not None
    assert kernels.run(problem.replace(residual=channels_last(problem.residual))).is_contiguous()
    problem = problem.replace(x=channels_last(problem.x), residual=sliced(problem.residual))
    assert kernels.run(problem).is_contiguous(memory_format=torch.channels_last)
