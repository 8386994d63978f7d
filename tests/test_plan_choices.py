"""What the plan chooses for layers of real networks on an H100, held to reasons and not to names of plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fused_cna import ConvProblem, Explanation, explain
from fused_cna.plan import planner
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
mobilenet_v2 last expand     | 1x160x7x7 960x1x1         | mma, whole; mma, busy; whole, busy
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


FEW_ROWS = table("""
resnet50 conv4 reduce      | 1x1024x14x14 256x1x1             | 95, 50
resnet50 conv4 3x3         | 1x256x14x14 256x3x3 pad 1        | 95, 50
resnet50 conv4 expand +    | 1x256x14x14 1024x1x1             | 95, 50
resnet50 conv5 shortcut +  | 1x1024x14x14 2048x1x1 stride 2   | 95, 95
resnet50 conv5 reduce      | 1x2048x7x7 512x1x1               | 95, 40
resnet50 conv5 3x3         | 1x512x7x7 512x3x3 pad 1          | 95, 40
resnet50 conv5 expand +    | 1x512x7x7 2048x1x1               | 95, 25
mobilenet_v2 project +     | 1x960x7x7 160x1x1                | 95, 95
mobilenet_v2 expand        | 1x160x7x7 960x1x1                | 20, 10
mobilenet_v2 last          | 1x320x7x7 1280x1x1               | 25, 15
efficientnet_b0 project +  | 1x1152x7x7 192x1x1               | 25, 15
efficientnet_b0 last       | 1x1152x7x7 320x1x1               | 40, 15
squeeze 64 images          | 64x1152x1x1 48x1x1               | 95, 95
squeeze                    | 128x672x1x1 28x1x1               | 95, 95
squeeze short              | 128x96x1x1 4x1x1                 | 90, 90
squeeze wide               | 128x256x1x1 16x1x1               | 95, 95
squeeze square             | 128x64x1x1 64x1x1                | 95, 95
head of 1000               | 128x2048x1x1 1000x1x1            | 95, 25
""")
"""Layers of few pixels, and the least percentage of multiprocessors with a block: of an H100, an A100."""


@pytest.mark.parametrize(("device", "multiprocessors"), [("H100", MULTIPROCESSORS), ("A100", 108)])
@pytest.mark.parametrize("layer", FEW_ROWS, ids=str)
def test_layers_of_few_pixels_keep_multiprocessors_busy(
    layer: ConvShape, device: str, multiprocessors: int
) -> None:
    """In one launch where blocks of a cluster can share a tile; elsewhere a second has to pay for itself."""
    added = {"residual": "add_act"} if layer.name.endswith("+") else {}
    sizes = (*layer.x_size, layer.k, layer.r, layer.s)
    plan = explain(ConvProblem(*sizes, **layer.options(), act="relu", **added), device=device)
    least = dict(zip(("H100", "A100"), map(int, layer.reason.split(", ")), strict=True))[device]
    assert 100 * plan.candidates[0]["blocks"] >= least * multiprocessors, plan
    assert plan.candidates[0]["workspace_bytes"] == 0 or device == "A100", plan


def test_a_second_launch_costs_less_where_it_starts_early() -> None:
    """The kernels of both are the same, but only one of them overlaps their launches."""
    problem = planner().problem(ConvProblem(1, 512, 7, 7, 512, 3, 3, padding=1).question())
    early = planner().device("H100")
    name = "implicit_gemm_sm80 64x64x64 split 8 masked 16-byte"
    devices = [early | {"has_hopper_code": code} for code in (True, False)]
    with_overlap, without = (planner().find(problem, device, name)["overhead_us"] for device in devices)
    assert with_overlap < without


@pytest.mark.parametrize("split", range(2, 9))
def test_a_cluster_of_any_size_shares_a_reduction_that_it_shortens(split: int) -> None:
    """A block's steps are fewer than in a smaller cluster, and two at least."""
    candidates = explain(ConvProblem(1, 64 * 2 * split, 7, 7, 64, 1, 1), device="H100").candidates
    found = {c["split_k"] for c in candidates if c["kernel"] == "implicit_gemm_sm90" and not c["illegal"]}
    assert max(found) == split
    assert all(-(-2 * split // some) < -(-2 * split // (some - 1)) for some in found if some > 1)
