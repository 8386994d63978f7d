"""What is special to the stem kernel: chunks of large filters, many tiles a block, and the strides of x."""

from __future__ import annotations

import pytest
import torch

from fused_cna import ConvProblem, explain
from tests.conformance import Subject
from tests.conftest import Backend, Simulator
from tests.families import BY_NAME
from tests.reference import DTYPES, Problem, Wanted, integer_problem
from tests.shapes import ConvShape, table
from tests.simt import list_plans

STEM = BY_NAME["stem"]

CHUNKED = tuple(shape for shape in STEM.shapes if shape.r > 30)

(MANY_TILES,) = table("""
many_tiles | 3x3x145x160 9x3x3 stride 2, pad 1 | more tiles than blocks
""")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_chunks_are_exact(shape: ConvShape, dtype: torch.dtype) -> None:
    subject = Subject(Simulator(), STEM, shape, dtype)
    problem = integer_problem(shape, dtype)
    chunked = [plan for plan in STEM.plans(problem, "L4") if int(plan.split()[-1]) < shape.r]
    subject.check(problem, subject.chance.sample(chunked, 2), device="L4")


@dtypes
def test_a_block_makes_many_tiles_one_after_the_other(dtype: torch.dtype) -> None:
    question = ConvProblem(3, 3, 145, 160, 9, 3, 3, stride=2, padding=1, dtype=dtype)
    candidates = explain(question, device="L4").candidates
    name, blocks = next((c["name"], c["blocks"]) for c in candidates if "stem 64x32" in c["name"])
    tile_p, tile_q = map(int, name.split()[3].split("x"))
    assert 1.5 * blocks < 3 * -(-MANY_TILES.p // tile_p) * -(-MANY_TILES.q // tile_q)
    problem = integer_problem(MANY_TILES, dtype, Wanted("relu"))
    Subject(Simulator(), STEM).check(problem, [name], device="L4")


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
    shape = ConvShape(name, *size, 8, 1 if size[2] == 1 else 3, 3, "strides of its own", (2, 2), (0, 1))
    memory = integer_problem(ConvShape("memory", 1, 1, 1, 2048, 1, 1, 1, ""), dtype).x.flatten()
    return integer_problem(shape, dtype).replace(x=memory.as_strided(size, strides))


@dtypes
@pytest.mark.parametrize("name", ALMOST_UNITS)
def test_strides_beside_those_of_wide_loads(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    subject = Subject(kernels, STEM, name, dtype)
    problem = strided_problem(name, dtype)
    subject.check(problem, subject.plans(problem)[:1])


def test_channels_that_nobody_has_are_for_direct() -> None:
    half = torch.zeros((), dtype=torch.float16)
    plans = list_plans(half.expand(1, 0, 4, 4), half.expand(8, 0, 1, 1))
    assert plans
    assert all(plan.startswith("direct") for plan in plans)
