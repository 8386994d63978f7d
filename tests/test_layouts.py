"""Kernels on tensors in any layout: views, odd strides, far offsets; and the output's own layout."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.conformance import Subject
from tests.conftest import Backend
from tests.families import BY_NAME, FAMILIES, Family, laid_out
from tests.layouts import LAYOUTS, Layout, channels_last, sliced
from tests.locks import locked
from tests.reference import Problem, Wanted, expected_rounded, integer_problem
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
    """A storage of more than 8 GiB, of which only what is touched takes memory.

    Views start in its middle, so that an offset that wraps to a negative 32-bit number reads zeros instead of
    ending the process.
    """

    middle, size = 2**32 + 2**13, 2**33 + 2**21
    """In bytes."""

    def __init__(self, device: str) -> None:
        if device == "cpu":
            map_noreserve = 0x4000
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
            self.storage = torch.frombuffer(mmap.mmap(-1, self.size, flags=flags), dtype=torch.uint8)
        else:
            self.storage = torch.zeros(self.size, dtype=torch.uint8, device=device)

    def view_of(self, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        start = self.middle // tensor.element_size()
        return self.storage.view(tensor.dtype).as_strided(tensor.shape, strides, start).copy_(tensor)


FAR = 2**31 + 2**8


@pytest.fixture
def expanses(kernels: Backend) -> Iterator[tuple[Expanse, Expanse]]:
    if kernels.device == "cpu":
        yield Expanse("cpu"), Expanse("cpu")
        return
    # 17 gigabytes: not in several workers at a time, and not kept by torch afterwards.
    with locked(ROOT / "build" / "expanse.lock"):
        made = Expanse(kernels.device), Expanse(kernels.device)
        yield made
        for each in made:
            del each.storage
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
    kernels: Backend, expanses: tuple[Expanse, Expanse], operand: str, strides: tuple[int, ...]
) -> None:
    shape = ConvShape("far", 2, 2, 4, 4, 3, 3, 3, "offsets beyond 2^31 elements", padding=(1, 1))
    problem = make(kernels, shape, torch.float16)
    tensor = getattr(problem, operand)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    assert reach >= 2**31
    check(kernels, problem.replace(**{operand: expanses[0].view_of(tensor, strides)}))


def far_images(tensor: Tensor) -> tuple[int, ...]:
    """Strides of images in channels_last, the last of them beyond 4 GiB."""
    n, c, _, w = tensor.shape
    return _aligned(tensor, n - 1), 1, w * c, c


def far_pixels(tensor: Tensor) -> tuple[int, ...]:
    """Strides of channels_last, with gaps between pixels, the last of them beyond 4 GiB."""
    n, _, h, w = tensor.shape
    pixel = _aligned(tensor, n * h * w - 1)
    return h * w * pixel, 1, w * pixel, pixel


def _aligned(tensor: Tensor, steps: int) -> int:
    """So many elements that as many steps reach beyond 4 GiB, and that each is to a 16-byte boundary."""
    return -(-(2**32 + 2**9) // (16 * steps)) * 16 // tensor.element_size()


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name != "chosen"], ids=str)
def test_every_kernel_reaches_beyond_32_bits(
    kernels: Backend, family: Family, expanses: tuple[Expanse, Expanse]
) -> None:
    """Each instantiation, with pixels or images of x and of the residual that are far apart.

    On a GPU the output overwrites the residual; the simulator would write and look through 4 GiB for that.
    """
    subject, dtype = Subject(kernels, family, "far"), family.dtypes[-1]
    reached, wanted = set[str](), Wanted("relu", residual_order="add_act")
    for shape in sorted(family.shapes, key=lambda shape: shape.n * shape.h * shape.w * shape.c):
        if shape.n * min(shape.h * shape.w, shape.p * shape.q) < 2:
            continue
        problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
        tensors = problem.x, problem.residual
        # Pointwise rows want pixels that are evenly apart.
        strides = (far_pixels,) if shape.n == 1 or shape.r * shape.s == 1 else (far_images, far_pixels)
        far = [subject.chance.choice(strides)(tensor) for tensor in tensors]
        x = torch.empty_strided(problem.x.shape, far[0], dtype=dtype, device="meta")
        plans = {family.instantiation(plan): plan for plan in subject.one_of_each(problem.replace(x=x))}
        for kind in plans.keys() - reached:
            placed = (expanse.view_of(*pair) for expanse, *pair in zip(expanses, tensors, far, strict=True))
            x, residual = placed
            given = kernels.place(problem).replace(x=x, residual=residual)
            extra = {} if kernels.device == "cpu" else {"out": residual}
            subject.check(given, [plans[kind]], expected_rounded(problem), **extra)
        reached |= plans.keys()
    assert reached == family.instantiations(dtype)


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
