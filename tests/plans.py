"""The plans that could run a problem, by name: asked of the planner, without a GPU or the simulator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_cna import _extension, _tuned
from fused_cna.plan import DEFAULT_DEVICE, planner
from fused_cna.problem import call_question
from tests.reference import Problem


def this_machine() -> str | dict[str, Any]:
    """The GPU that the kernels run on here; without one the device that the simulator takes by default."""
    if torch.cuda.is_available() and _extension.is_available():
        return dict(_tuned.cuda_target(0).info)
    return DEFAULT_DEVICE


def plan_names(
    problem: Problem, kernel: str, *, device: str | None = None, allow_tf32: bool = False
) -> list[str]:
    """A kernel's legal plans for tensors as they lie in memory, the fastest by estimate first."""
    question = call_question(
        problem.x,
        problem.weight,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        norm=problem.running_mean is not None,
        act=problem.act,
        residual=None if problem.residual is None else problem.residual_order,
    )
    asked = planner().problem(question | {"allow_tf32": allow_tf32})
    listed = planner().candidates(asked, device or this_machine())
    return [c["name"] for c in listed if c["kernel"] == kernel and not c["illegal"]]


def describe(plan: str, x: Tensor, weight: Tensor) -> str:
    """One plan on one problem, in a line: the plan, then what tells the problems of the tests apart."""
    dtype = str(x.dtype).removeprefix("torch.")
    layout = "nchw" if x.is_contiguous() else "nhwc"
    return f"{plan or 'chosen'} {dtype} {layout} x{list(x.shape)} weight{list(weight.shape)}"
