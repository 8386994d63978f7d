"""What the plan chooses for layers of real networks on an H100, held to reasons and not to names of plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fused_cna import ConvProblem, Explanation, explain

MULTIPROCESSORS = 132
TENSOR_CORES = ("implicit_gemm_sm80", "grouped")

Reason = Callable[[ConvProblem, Explanation], bool]


def by(*kernels: str) -> Reason:
    return lambda problem, plan: plan.kernel in kernels


REASONS: dict[str, tuple[str, Reason]] = {
    "mma": ("products on tensor cores", by(*TENSOR_CORES)),
    "depthwise": ("a channel's products share nothing", by("depthwise", "depthwise_toeplitz")),
    "stem": ("three channels are read as they are", by("stem")),
    "few rows": ("one read of the weight is all there is", by("small_m")),
    "narrow": ("no tile twice as wide as the output channels", lambda p, e: e.tile[1] < 2 * max(p.k, 32)),
    "large": (
        "operands cross the L2 once for at least 128 rows and 128 columns",
        lambda p, e: min(e.tile[:2]) >= 128,
    ),
    "busy": (
        "a block for most multiprocessors",
        lambda p, e: e.candidates[0]["blocks"] >= 0.7 * MULTIPROCESSORS,
    ),
    "split": ("pixels are too few to fill the device, the reduction is long", lambda p, e: e.split_k > 1),
    "whole": ("a second launch would buy nothing", lambda p, e: e.split_k == 1),
    "memory": (
        "nothing takes twice as long as device memory",
        lambda p, e: e.estimate_us - e.candidates[0]["overhead_us"] < 2 * e.candidates[0]["bytes_us"],
    ),
}


def layer(c: int, size: int, k: int, filter_size: int = 1, **options: Any) -> Callable[[int], ConvProblem]:
    options = {"padding": filter_size // 2, "act": "relu", **options}
    return lambda batch: ConvProblem(batch, c, size, size, k, filter_size, filter_size, **options)


ADDED = {"residual": "add_act"}
LAYERS: dict[str, tuple[Callable[[int], ConvProblem], dict[int, str]]] = {
    "resnet50 stem": (
        layer(3, 224, 64, 7, stride=2),
        {1: "stem, busy", 32: "stem, memory", 128: "stem, memory"},
    ),
    "resnet50 conv2 reduce": (
        layer(64, 56, 64),
        {1: "mma, narrow", 32: "narrow, memory", 128: "narrow, memory"},
    ),
    "resnet50 conv2 3x3": (layer(64, 56, 64, 3), {1: "mma", 32: "mma, narrow", 128: "mma, narrow"}),
    "resnet50 conv2 expand": (layer(64, 56, 256, **ADDED), {1: "busy", 32: "memory", 128: "memory, whole"}),
    "resnet50 conv2 next": (layer(256, 56, 64), {1: "whole", 32: "narrow, memory", 128: "narrow, memory"}),
    "resnet50 conv3 3x3": (layer(128, 28, 128, 3), {1: "busy", 32: "mma, whole", 128: "large, whole"}),
    "resnet50 conv3 shortcut": (
        layer(256, 56, 512, stride=2, padding=0, **ADDED),
        {1: "busy, whole", 32: "large", 128: "large, memory"},
    ),
    "resnet50 conv4 3x3": (layer(256, 14, 256, 3), {1: "split, busy", 32: "large", 128: "large, whole"}),
    "resnet50 conv4 expand": (
        layer(256, 14, 1024, **ADDED),
        {1: "whole", 32: "memory", 128: "large, memory"},
    ),
    "resnet50 conv5 3x3": (layer(512, 7, 512, 3), {1: "split, busy", 32: "large, split", 128: "large"}),
    "resnet50 conv5 reduce": (layer(2048, 7, 512), {1: "split, busy", 32: "large", 128: "large, busy"}),
    "resnet50 conv5 expand": (layer(512, 7, 2048, **ADDED), {1: "mma", 32: "large", 128: "large, busy"}),
    "mobilenet_v2 expand": (
        layer(16, 112, 96),
        {1: "mma, busy", 32: "narrow, memory", 128: "narrow, memory"},
    ),
    "mobilenet_v2 project": (
        layer(144, 56, 24),
        {1: "mma, whole", 32: "narrow, memory", 128: "narrow, memory"},
    ),
    "mobilenet_v2 depthwise": (
        layer(144, 56, 144, 3, groups=144),
        {1: "depthwise", 32: "depthwise, memory", 128: "depthwise, memory"},
    ),
    "mobilenet_v2 strided depthwise": (
        layer(96, 112, 96, 3, groups=96, stride=2),
        {1: "depthwise", 32: "depthwise, memory", 128: "depthwise, memory"},
    ),
    "mobilenet_v2 last expand": (layer(160, 7, 960), {1: "busy, whole", 32: "mma, busy", 128: "whole, busy"}),
    "efficientnet_b0 5x5": (
        layer(672, 14, 672, 5, groups=672),
        {1: "depthwise", 32: "depthwise, busy", 128: "depthwise, busy"},
    ),
    "efficientnet_b0 squeeze": (layer(672, 1, 28), {1: "few rows", 32: "few rows", 128: "few rows, busy"}),
    "efficientnet_b0 excite": (layer(28, 1, 672), {1: "whole", 32: "whole", 128: "whole"}),
    "efficientnet_b0 last project": (layer(1152, 7, 320), {1: "busy", 32: "mma", 128: "narrow, busy"}),
}


@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("name", LAYERS)
def test_the_choice_has_its_reasons(name: str, batch: int) -> None:
    make, wanted = LAYERS[name]
    problem = make(batch)
    plan = explain(problem, device="H100")
    for reason in wanted[batch].split(", "):
        words, holds = REASONS[reason]
        assert holds(problem, plan), f"{words}: {plan}"
