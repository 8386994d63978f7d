"""What fused_cna's planner says about a row, to stand beside what was measured."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.rows import Row
from bench.setting import PRECISIONS
from fused_cna.activation import describe
from fused_cna.plan import DEFAULT_DEVICE, ConvProblem, explain

DEVICES = ("A100", "L4", "RTX 4090", "H100", "H200", "B200")


@dataclass(frozen=True)
class Plan:
    """The planner's choice for a row on `device`; `estimate_us` is its model, not a measurement."""

    device: str
    kernel: str
    tile: tuple[int, ...]
    split_k: int
    estimate_us: float

    @property
    def text(self) -> str:
        """'implicit_gemm_sm80 128x64x32', with the split where there is one."""
        tile = "x".join(str(size) for size in self.tile) if any(self.tile) else ""
        split = f"split {self.split_k}" if self.split_k > 1 else ""
        return " ".join(word for word in (self.kernel, tile, split) if word)


def planner_device(device_name: str | None) -> str | None:
    """The planner's name for a GPU as torch names it, by default H100; None for one that it does not know."""
    if device_name is None:
        return DEFAULT_DEVICE
    return next((known for known in DEVICES if re.search(rf"\b{known}\b", device_name)), None)


def plan_of(row: Row, device: torch.device, device_name: str) -> tuple[Plan | None, str | None]:
    """The plan, or None and the reason why there is none. On a CPU the one for the default GPU."""
    known = planner_device(device_name if device.type == "cuda" else None)
    if known is None:
        return None, f"the planner does not know {device_name!r}; it knows {', '.join(DEVICES)}"
    try:
        with PRECISIONS[row.precision].applied():
            chosen = explain(_problem(row), device=known)
            return Plan(known, chosen.kernel, chosen.tile, chosen.split_k, chosen.estimate_us), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _problem(row: Row) -> ConvProblem:
    layer = row.layer
    act, _ = describe(nn.Identity() if layer.act == "none" else getattr(nn, layer.act)()) or ("identity", ())
    stride, padding, dilation, groups = layer.geometry
    sizes: dict[str, Any] = {
        "n": row.batch,
        "c": layer.cin,
        "h": layer.h,
        "w": layer.w,
        "k": layer.cout,
        "r": layer.kh,
        "s": layer.kw,
    }
    return ConvProblem(
        **sizes,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        dtype=PRECISIONS[row.precision].dtype,
        norm=layer.has_norm,
        act=act,
        residual=layer.residual_order,
    )
