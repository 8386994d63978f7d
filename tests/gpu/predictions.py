"""What the kernels were predicted to take on an H100, in us in a CUDA graph, before the first was measured.

"mended" counts on the changes that the predictions asked for. cuDNN's column is its fused convolution with
the norm folded ahead; the plan "cudnn", which is measured, folds in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    what: str
    problem: Mapping[str, Any]
    """Fields of the planner's problem that tell the layer."""
    now: str
    mended: str
    cudnn: str


def pointwise(c: int, k: int, h: int, n: int = 32, **more: Any) -> dict[str, Any]:
    return {"r": 1, "s": 1, "c": c, "k": k, "h": h, "n": n, "groups": 1} | more


def square(size: int, c: int, h: int, n: int = 32, **more: Any) -> dict[str, Any]:
    return {"r": size, "s": size, "c": c, "k": c, "h": h, "n": n, "groups": 1, "stride_h": 1} | more


LAYERS = (
    Prediction("1x1 64 to 64, 56", pointwise(64, 64, 56), "23", "12", "11"),
    Prediction("1x1 64 to 256 + residual, 56", pointwise(64, 256, 56, has_residual=True), "73", "42", "43"),
    Prediction("3x3 64, 56", square(3, 64, 56), "34", "20-23", "20"),
    Prediction("3x3 256, 14", square(3, 256, 14), "33", "31", "15"),
    Prediction("stem 7x7", {"r": 7, "c": 3, "n": 32}, "28-34", "28-34", "45-60"),
    Prediction("1x1 16 to 96, 112", pointwise(16, 96, 112), "82", "61", "37"),
    Prediction("1x1 144 to 24, 56", pointwise(144, 24, 56), "27", "13", "13"),
    Prediction("depthwise 3x3 144, 56", square(3, 144, 56, groups=144), "24", "23", "45-90"),
    Prediction("depthwise 5x5 672, 14", square(5, 672, 14, groups=672), "15-18", "15-18", "30-50"),
)

NETWORKS = {"resnet50:1": (407, 322), "resnet50:32": (1670, 1230)}
"""Of all convolutions but the stem: now and mended."""
