"""Problems and plans that reach every instantiation of every kernel, on the GPU as in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from tests.layouts import channels_last
from tests.reference import DTYPES, Problem, Wanted, integer_problem
from tests.shapes import ConvShape
from tests.test_depthwise_kernel import SHAPES as DEPTHWISE
from tests.test_depthwise_kernel import depthwise_plans
from tests.test_depthwise_toeplitz_kernel import SHAPES as TOEPLITZ
from tests.test_float32_kernels import KERNELS, plans_of
from tests.test_grouped_kernel import GROUPED, grouped_plans, instantiation
from tests.test_simt_implicit_gemm import LARGER, tensor_core_plans, without_split
from tests.test_small_m_kernel import FEW_PIXELS, one_of_each_kind

Plans = Callable[[Problem], Iterable[str]]


def gemm_plans(problem: Problem) -> Iterable[str]:
    """One for each instantiation, the one with the most splits."""
    return {without_split(plan): plan for plan in reversed(tensor_core_plans(problem))}.values()


def float32_plans(problem: Problem) -> Iterable[str]:
    names = [plan for kernel in KERNELS for plan in plans_of(problem, kernel)]
    return {without_split(plan): plan for plan in reversed(names)}.values()


def narrow_group_plans(problem: Problem) -> Iterable[str]:
    return {instantiation(plan): plan for plan in grouped_plans(problem)}.values()


def toeplitz_plans(problem: Problem) -> Iterable[str]:
    return ["depthwise_toeplitz"]


FAMILIES: tuple[tuple[tuple[ConvShape, ...], tuple[torch.dtype, ...], Plans], ...] = (
    (LARGER, tuple(DTYPES), gemm_plans),
    (LARGER, (torch.float32,), float32_plans),
    (tuple(FEW_PIXELS), tuple(DTYPES), one_of_each_kind),
    (tuple(GROUPED), tuple(DTYPES), narrow_group_plans),
    (tuple(DEPTHWISE), tuple(DTYPES), depthwise_plans),
    (tuple(TOEPLITZ), (torch.float16, torch.bfloat16), toeplitz_plans),
)


def plans_of_every_kernel(wanted: Wanted) -> Iterator[tuple[Problem, str]]:
    """Integer problems in channels_last, each with a plan to run it by."""
    for shapes, dtypes, plans in FAMILIES:
        for shape in shapes:
            for dtype in dtypes:
                problem = integer_problem(shape, dtype, wanted)
                dense = problem.map(lambda tensor: channels_last(tensor) if tensor.dim() == 4 else tensor)
                for plan in plans(dense):
                    yield dense, plan
