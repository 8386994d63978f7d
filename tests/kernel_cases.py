"""Problems and plans that reach every instantiation of every kernel, and what each gives on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import fused_cna
from tests.layouts import Layout, channels_last, contiguous, moved
from tests.plans import plan_names
from tests.reference import DTYPES, Problem, Wanted, difference, expected_rounded, integer_problem
from tests.shapes import SHAPES, ConvShape
from tests.test_depthwise_kernel import SHAPES as DEPTHWISE
from tests.test_depthwise_kernel import depthwise_plans
from tests.test_depthwise_toeplitz_kernel import SHAPES as TOEPLITZ
from tests.test_depthwise_toeplitz_kernel import plans_of as toeplitz_plans
from tests.test_float32_kernels import KERNELS
from tests.test_grouped_kernel import GROUPED, grouped_plans, instantiation
from tests.test_kernels import TILES
from tests.test_simt_implicit_gemm import LARGER, tensor_core_plans, without_split
from tests.test_small_m_kernel import FEW_PIXELS, one_of_each_kind
from tests.test_stem_kernel import ALL as STEMS
from tests.test_stem_kernel import stem_plans

HALVES = (torch.float16, torch.bfloat16)


def gemm_plans(problem: Problem) -> Iterable[str]:
    """One for each instantiation, the one with the most splits."""
    return {without_split(plan): plan for plan in reversed(tensor_core_plans(problem))}.values()


def float32_plans(problem: Problem) -> Iterable[str]:
    names = [plan for kernel in KERNELS for plan in plan_names(problem, kernel)]
    return {without_split(plan): plan for plan in reversed(names)}.values()


def narrow_group_plans(problem: Problem) -> Iterable[str]:
    return {instantiation(plan): plan for plan in grouped_plans(problem)}.values()


@dataclass(frozen=True)
class Family:
    """The shapes, dtypes and layouts that reach all of a kernel, and its plans for one of them."""

    shapes: Iterable[ConvShape]
    dtypes: tuple[torch.dtype, ...]
    plans: Callable[[Problem], Iterable[str]]
    layouts: tuple[Layout, ...] = (channels_last,)


FAMILIES = {
    "chosen": Family(SHAPES, DTYPES, lambda problem: [""], (contiguous, channels_last)),
    "direct": Family(SHAPES, DTYPES, lambda problem: [f"direct {tile}" for tile in TILES["direct"]]),
    "implicit_gemm_sm80": Family(LARGER, DTYPES, gemm_plans),
    "float32": Family(LARGER, (torch.float32,), float32_plans),
    "small_m": Family(FEW_PIXELS, DTYPES, one_of_each_kind),
    "grouped": Family(GROUPED, DTYPES, narrow_group_plans),
    "depthwise": Family(DEPTHWISE, DTYPES, depthwise_plans),
    "depthwise_toeplitz": Family(TOEPLITZ, HALVES, toeplitz_plans),
    "stem": Family(STEMS, DTYPES, stem_plans, (contiguous, channels_last)),
}


def plans_of(name: str, dtype: torch.dtype) -> Iterator[tuple[Problem, str]]:
    """Integer problems, each with a plan to run it by."""
    family = FAMILIES[name]
    for shape in family.shapes:
        problem = integer_problem(shape, dtype, Wanted(act="relu", residual_order="add_act"))
        for layout in family.layouts:
            placed = problem.map(lambda tensor, lay=layout: lay(tensor) if tensor.dim() == 4 else tensor)
            for plan in family.plans(placed):
                yield placed, plan


def plans_of_every_kernel() -> Iterator[tuple[Problem, str]]:
    for name, family in FAMILIES.items():
        for dtype in family.dtypes:
            yield from plans_of(name, dtype)


def run_on_gpu(problem: Problem, plan: str) -> str:
    """Runs the plan on the GPU; how its result differs from the formula, empty where it does not.

    All but the convolution is computed on the CPU and copied, so that a tool which watches the GPU sees
    the kernel alone.
    """
    with fused_cna.forced_plan(plan), torch.inference_mode():
        actual = problem.map(lambda tensor: moved(tensor, "cuda")).call(fused_cna.conv_norm_act).cpu()
    return difference(actual, expected_rounded(problem))
