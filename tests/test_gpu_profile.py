"""What `make gpu-profile` runs, and reads of Nsight Compute's pages."""

from __future__ import annotations

import pytest

from fused_cna import ConvProblem, explain
from tests.gpu.profile import LAYERS, Layer, read_details, read_source

DETAILS = """[1] python3@127.0.0.1
  void a::b<c>(d) (1568, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    Metric Name             Metric Unit Metric Value
    Duration                         us        52.38
    Grid Size                                  1,568
    INF   Duration of everything: 7

  void e(d) (1, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         ms         1.50
"""

SOURCE = """"Kernel Name","b"
"Address","Source","# Samples","Instructions Executed","stall_wait","stall_barrier","stall_wait (Not Issued)"
"0x0","LDC R1","10","4","10","0","9"
"0x1","HMMA.16816 R1","20","8","5","15","9"
"0x2","@P0 HMMA.16816 R1","0","0","0","0","0"
"0x3","EXIT","10","4","10","0","9"
"""


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_profiled_layer_has_its_plan(layer: Layer) -> None:
    """And one that is a single launch, because a kernel is told from the next by its place in the list."""
    problem = ConvProblem(
        *(32, layer.channels[0], layer.size, layer.size, layer.channels[1], layer.filter, layer.filter),
        stride=layer.stride,
        padding=layer.filter // 2,
        groups=layer.groups,
        act=layer.act,
        residual="add_act" if layer.add else None,
    )
    candidates = explain(problem, device="H100").candidates
    legal = [
        each["name"] for each in candidates if each["name"].startswith(layer.plan) and not each["illegal"]
    ]
    assert legal
    assert "split" not in legal[0] or "split 1" in legal[0]
    assert "after a copy" not in legal[0]


def test_details() -> None:
    assert list(read_details(DETAILS)) == [
        {"Duration": "52.38 us", "Grid Size": "1,568"},
        {"Duration": "1.50 ms"},
    ]


def test_a_kernel_that_is_listed_twice_is_read_once() -> None:
    other = SOURCE.replace('"10"', '"30"').replace("HMMA", "FFMA")
    first, second = read_source((SOURCE + SOURCE + other).splitlines())
    assert first == {
        "stalls": {"wait": 0.625, "barrier": 0.375},
        "parts": {
            "before": {"time": 0.25, "instructions": 1.0},
            "products": {"time": 0.5, "instructions": 2.0},
            "behind": {"time": 0.25, "instructions": 1.0},
        },
    }
    assert second["parts"] == {}, "without tensor cores there is no telling where the products are"
