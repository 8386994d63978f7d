"""How tests run a kernel family: in the simulator or on a GPU, by some of its plans, against the formula."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.conftest import Backend
from tests.families import Family
from tests.reference import (
    TENSORS,
    Problem,
    Wanted,
    difference,
    expected_exactly,
    expected_rounded,
    random_problem,
    relative_error,
)
from tests.shapes import ConvShape


class Subject:
    """A family on a backend, with a source of chance for a test."""

    def __init__(self, kernels: Backend, family: Family, *seed: object) -> None:
        self.kernels = kernels
        self.family = family
        self.chance = random.Random(" ".join(map(str, seed)))

    def plans(self, problem: Problem) -> list[str]:
        plans = self.family.plans(problem, self.kernels.planned_for(self.family.device))
        assert plans, "no plan takes it"
        return plans

    def one_of_each(self, problem: Problem) -> list[str]:
        return self.family.one_of_each(self.plans(problem), self.chance)

    def run(self, problem: Problem, plan: str, **extra: object) -> Tensor:
        placed = self.kernels.place(problem)
        extra = {**self.kernels.on(self.family.device), **extra}
        return self.kernels.run(placed, plan=plan, allow_tf32=self.family.allow_tf32, **extra).cpu()

    def check(
        self, problem: Problem, plans: Iterable[str], expected: Tensor | None = None, **extra: object
    ) -> None:
        """Runs the plans, with threads in any order, and asserts the formula rounded once."""
        expected = expected_rounded(problem) if expected is None else expected
        for plan in plans:
            order = self.kernels.thread_order(self.chance.randrange(1000))
            wrong = difference(self.run(problem, plan, **order, **extra), expected)
            assert not wrong, f"{plan}: {wrong}"

    def check_error(self, problem: Problem, plans: Iterable[str]) -> None:
        """Runs the plans, and asserts that their errors are within the family's bound."""
        expected = expected_exactly(problem)
        eager = self.kernels.eager_error(self.kernels.place(problem))
        bound = max(self.family.error(problem.x.dtype), 1.05 * eager)
        for plan in plans:
            actual = self.run(problem, plan)
            assert actual.dtype == problem.x.dtype
            error = relative_error(actual, expected)
            assert error <= bound, f"{plan}: relative error {error:.3g} exceeds {bound:.3g}"

    def check_repeats(self, problem: Problem, plans: Iterable[str]) -> None:
        """Asserts that the order of threads and blocks changes no bit."""
        for plan in plans:
            first, *others = (
                bits(self.run(problem, plan, **self.kernels.thread_order(seed))) for seed in (0, 1, 2)
            )
            assert all(torch.equal(other, first) for other in others), plan

    def check_not_finite(self, problem: Problem, plans: Iterable[str], **extra: object) -> Tensor:
        """Asserts the formula value by value: infinities keep their sign, NaN stays; returns it."""
        expected = expected_exactly(problem).to(problem.x.dtype)
        for plan in plans:
            actual = self.run(problem, plan, **extra)
            wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
            assert not wrong.any(), f"{plan}: {wrong.sum()} differ, first at {wrong.nonzero()[0].tolist()}"
        return expected


def random_case(shape: ConvShape, dtype: torch.dtype, wanted: Wanted) -> Problem:
    """A random problem; of few pixels with half their mean: all of it would leave roundings alone."""
    problem = random_problem(shape, dtype, wanted)
    if shape.n * shape.p * shape.q > 32 or problem.running_mean is None:
        return problem
    return problem.replace(running_mean=problem.running_mean / 2)


def pixels_read(shape: ConvShape) -> list[tuple[int, int]]:
    """Pixels of x that the first, the middle and the last output pixel read, as far as they read any."""
    middle_first = sorted(
        itertools.product(range(shape.r), range(shape.s)),
        key=lambda tap: abs(2 * tap[0] - shape.r + 1) + abs(2 * tap[1] - shape.s + 1),
    )
    found = []
    for p, q in ((0, 0), (shape.p // 2, shape.q // 2), (shape.p - 1, shape.q - 1)):
        first_h, first_w = p * shape.stride[0] - shape.pads[0], q * shape.stride[1] - shape.pads[2]
        read = ((first_h + r * shape.dilation[0], first_w + s * shape.dilation[1]) for r, s in middle_first)
        inside = ((h, w) for h, w in read if 0 <= h < shape.h and 0 <= w < shape.w)
        found += [pixel for pixel in [next(inside, None)] if pixel is not None]
    return found


def without_zeros(weight: Tensor) -> Tensor:
    """Weights that times infinity are infinite."""
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def memory_of(problem: Problem) -> list[Tensor]:
    """A copy of what the operands' storages hold, bit for bit."""
    tensors = (getattr(problem, name) for name in TENSORS)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s).clone() for s in storages]


def bits(tensor: Tensor) -> Tensor:
    """What a tensor holds, bit for bit."""
    return tensor.contiguous().flatten().view(torch.int16)
