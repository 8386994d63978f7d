"""What the plan chooses for layers of real networks on an H100, held to reasons and not to names of plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fused_cna import ConvProblem, Explanation, explain
from tests.shapes import ConvShape, table

MULTIPROCESSORS = 132
TENSOR_CORES = ("implicit_gemm_sm80", "implicit_gemm_sm90", "grouped")

Reason = Callable[[ConvProblem, Explanation], bool]


def by(*kernels: str) -> Reason:
    return lambda problem, plan: plan.kernel in kernels


REASONS: dict[str, tuple[str, Reason]] = {
    "mma": ("products on tensor cores", by(*TENSOR_CORES)),
    "apart": ("a channel's products share nothing", by("depthwise", "depthwise_toeplitz")),
    "stem": ("three channels are read as they are", by("stem")),
    "few rows": ("one read of the weight is all there is", by("small_m")),
    "narrow": ("no tile twice as wide as the output channels", lambda p, e: e.tile[1] < 2 * max(p.k, 32)),
    "large": (
        "operands cross the L2 once for at least 128 rows and 128 columns",
        lambda p, e: min(e.tile[:2]) >= 128,
    ),
    "busy": (
        "a block for most multiprocessors, or clusters as large as they get",
        lambda p, e: (
            e.candidates[0]["blocks"] >= 0.7 * MULTIPROCESSORS
            or (e.kernel == "implicit_gemm_sm90" and e.split_k == 8)
        ),
    ),
    "split": ("pixels are too few to fill the device, the reduction is long", lambda p, e: e.split_k > 1),
    "whole": ("a second launch would buy nothing", lambda p, e: e.split_k == 1),
    "memory": (
        "nothing takes twice as long as device memory",
        lambda p, e: e.estimate_us - e.candidates[0]["overhead_us"] < 2 * e.candidates[0]["bytes_us"],
    ),
}


LAYERS = table("""
resnet50 stem                | 1x3x224x224 64x7x7 stride 2, pad 3 | stem, busy; stem, memory; stem, memory
resnet50 conv2 reduce        | 1x64x56x56 64x1x1         | mma, narrow; narrow, memory; narrow, memory
resnet50 conv2 3x3           | 1x64x56x56 64x3x3 pad 1   | mma; mma, narrow; mma, narrow
resnet50 conv2 expand +      | 1x64x56x56 256x1x1        | busy; memory; memory, whole
resnet50 conv2 next          | 1x256x56x56 64x1x1        | whole; narrow, memory; narrow, memory
resnet50 conv3 3x3           | 1x128x28x28 128x3x3 pad 1 | busy; mma, whole; large, whole
resnet50 conv3 shortcut +    | 1x256x56x56 512x1x1 stride 2 | busy, whole; large; large, memory
resnet50 conv4 3x3           | 1x256x14x14 256x3x3 pad 1 | split, busy; large; large, whole
resnet50 conv4 expand +      | 1x256x14x14 1024x1x1      | whole; memory; large, memory
resnet50 conv5 3x3           | 1x512x7x7 512x3x3 pad 1   | split, busy; large, split; large
resnet50 conv5 reduce        | 1x2048x7x7 512x1x1        | split, busy; large; large, busy
resnet50 conv5 expand +      | 1x512x7x7 2048x1x1        | mma; large; large, busy
mobilenet_v2 expand          | 1x16x112x112 96x1x1       | mma, busy; narrow, memory; narrow, memory
mobilenet_v2 project         | 1x144x56x56 24x1x1        | mma, whole; narrow, memory; narrow, memory
mobilenet_v2 depthwise       | 1x144x56x56 144x3x3 pad 1, groups 144 | apart; apart, memory; apart, memory
mobilenet_v2 strided | 1x96x112x112 96x3x3 stride 2, pad 1, groups 96 | apart; apart, memory; apart, memory
mobilenet_v2 last expand     | 1x160x7x7 960x1x1         | busy, whole; mma, busy; whole, busy
efficientnet_b0 5x5          | 1x672x14x14 672x5x5 pad 2, groups 672 | apart; apart, busy; apart, busy
efficientnet_b0 squeeze      | 1x672x1x1 28x1x1          | few rows; few rows; few rows, busy
efficientnet_b0 excite       | 1x28x1x1 672x1x1          | whole; whole; whole
efficientnet_b0 last project | 1x1152x7x7 320x1x1        | split; mma; narrow, busy
""")
"""Layers, those with a plus before a sum, and reasons for batches of 1, of 32 and of 128."""


@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_choice_has_its_reasons(layer: ConvShape, batch: int) -> None:
    added = {"residual": "add_act"} if layer.name.endswith("+") else {}
    sizes = (batch, *layer.x_size[1:], layer.k, layer.r, layer.s)
    problem = ConvProblem(*sizes, **layer.options(), act="relu", **added)
    plan = explain(problem, device="H100")
    wanted = layer.reason.split("; ")[[1, 32, 128].index(batch)]
    for reason in wanted.split(", "):
        words, holds = REASONS[reason]
        assert holds(problem, plan), f"{words}: {plan}"
