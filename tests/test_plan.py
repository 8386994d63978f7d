"""The plan: what it chooses, why not another, and that it says so without a GPU."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_cna
from fused_cna import ConvNormAct, ConvProblem, Device, explain, forced_plan
from tests.sass import find_extension

DEVICES = ("A100", "L4", "RTX 4090", "H100", "H200", "B200")
LAYERS = Path(__file__).parents[1] / "bench" / "data" / "conv_layers.csv"
RESNET = ConvProblem(256, 256, 14, 14, 256, 3, 3, padding=1)
TENSOR_CORES = "implicit_gemm_sm80"
HOPPER = "implicit_gemm_sm90"
ON_TENSOR_CORES = (TENSOR_CORES, HOPPER, "grouped")


def illegal(problem: ConvProblem, name: str, **options: Any) -> str:
    """Why a plan is out, by the start of its name."""
    reasons = [
        c["illegal"]
        for c in explain(problem, **options).candidates
        if c["name"].startswith(name) and c["illegal"]
    ]
    assert reasons, f"{name} is legal"
    return str(reasons[0])


@pytest.mark.parametrize("device", DEVICES)
def test_tensor_cores_take_a_dense_layer_on_every_device(device: str) -> None:
    explanation = explain(RESNET, device=device)
    expected = HOPPER if device in ("H100", "H200") else TENSOR_CORES
    assert explanation.kernel == expected
    assert explanation.split_k == 1
    m, n, k = explanation.tile
    assert m * n * k > 0
    assert explanation.estimate_us > 0
    text = str(explanation)
    assert device in text
    assert text.startswith(f"{expected} {m}x{n}x{k}")
    assert "runners-up" in text
    assert "direct" in {c["kernel"] for c in explanation.candidates}


def test_legal_plans_come_first_and_fastest_first() -> None:
    candidates = explain(ConvProblem(1, 64, 14, 14, 96, 5, 5, padding=2)).candidates
    legal = [c for c in candidates if not c["illegal"]]
    assert tuple(legal) == candidates[: len(legal)]
    assert [c["estimate_us"] for c in legal] == sorted(c["estimate_us"] for c in legal)


def test_a_plan_is_listed_once() -> None:
    """Small output planes, on which several tiles of the grouped kernel come to the same."""
    for size in (7, 14):
        for groups in (1, 4, 32):
            problem = ConvProblem(32, 256, size, size, 1024, 1, 1, groups=groups)
            names = [c["name"] for c in explain(problem).candidates if not c["illegal"]]
            assert len(names) == len(set(names)), problem


def test_the_estimate_is_the_largest_part_and_the_overheads() -> None:
    for c in explain(RESNET).candidates:
        if not c["illegal"]:
            parts = max(c["products_us"], c["bytes_us"], c["latency_us"])
            assert c["estimate_us"] == pytest.approx(parts + c["overhead_us"])


def test_few_pixels_split_the_reduction_and_many_do_not() -> None:
    """By a second launch on an A100; within a cluster on an H100."""
    for device, has_workspace in (("A100", True), ("H100", False)):
        late = explain(ConvProblem(1, 512, 7, 7, 512, 3, 3, padding=1), device=device)
        assert late.split_k > 1
        assert (late.candidates[0]["workspace_bytes"] > 0) == has_workspace
        assert explain(ConvProblem(128, 512, 7, 7, 512, 3, 3, padding=1), device=device).split_k == 1


def test_no_split_is_empty() -> None:
    for c in (2048, 4608, 512, 96):
        for candidate in explain(ConvProblem(1, c, 7, 7, 64, 3, 3, padding=1)).candidates:
            if candidate["split_k"] > 1:
                steps = 9 * -(-c // candidate["tile"][2])
                per_split = -(-steps // candidate["split_k"])
                assert (candidate["split_k"] - 1) * per_split < steps


def test_pointwise_layers_take_the_plain_gemm() -> None:
    for device, plain, others in (("A100", "pointwise", "masked"), ("H100", "tiled", "im2col")):
        for options, rows in (({}, plain), ({"stride": 2}, others), ({"padding": 1}, others)):
            problem = ConvProblem(32, 256, 56, 56, 64, 1, 1, **options)
            assert explain(problem, device=device).candidates[0]["rows"] == rows
    assert explain(ConvProblem(32, 256, 1, 1, 64, 1, 1)).candidates[0]["rows"] == "pointwise"


def test_a_tile_must_fit_the_shared_memory_of_the_device() -> None:
    reason = illegal(RESNET, f"{TENSOR_CORES} 128x128x64", device="L4")
    assert "131072" not in reason
    assert "shared memory" in reason


def test_a_module_and_its_input_are_seen_as_they_lie_in_memory() -> None:
    module = ConvNormAct(64, 128, 3).half().eval()
    x = torch.randn(8, 64, 28, 28).half()
    as_is = explain(module, x)
    assert as_is.candidates[0]["convert_x"]
    assert as_is.candidates[0]["convert_weight"]
    name = as_is.candidates[0]["name"].partition(" after")[0]
    module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    dense = explain(module, x)
    assert not dense.notes
    # What the copies cost is what the estimate of the same plan has without them.
    spared = [float(us) for note in as_is.notes for us in re.findall(r"([\d.]+) us", note)]
    (same,) = (c for c in dense.candidates if c["name"] == name)
    assert len(spared) == 2
    assert sum(spared) == pytest.approx(as_is.candidates[0]["overhead_us"] - same["overhead_us"], abs=0.1)
    sliced = torch.randn(8, 28, 28, 67).half().permute(0, 3, 1, 2)[:, 3:]
    assert explain(module, sliced).candidates[0]["convert_x"], "a misaligned slice is copied"
    aligned = torch.randn(8, 28, 28, 72).half().permute(0, 3, 1, 2)[:, 8:]
    assert explain(module, aligned).candidates[0]["access_bytes"] == 16
    expanded = torch.randn(1, 28, 28, 64).half().permute(0, 3, 1, 2).expand(8, -1, -1, -1)
    assert not explain(module, expanded).candidates[0]["convert_x"]
    assert explain(module, x[0]).kernel in ON_TENSOR_CORES


MODULE = ConvNormAct(4, 4)
A10 = Device("A10", (8, 6), 72, 100 << 10, 99 << 10, clock_ghz=1.7, bandwidth_gbs=600)


@pytest.mark.parametrize(
    ("question", "error", "named"),
    [
        (lambda: explain(RESNET, device="K80"), ValueError, "A100, L4, RTX 4090, H100, H200, B200"),
        (lambda: explain(ConvProblem(1, 8, 8, 8, 8, 1, 1, dtype=torch.float64)), ValueError, "float64"),
        (lambda: ConvProblem(1, 8, 8, 8, 8, 1, 1, groups=3), ValueError, "groups must divide"),
        (lambda: ConvProblem(0, 8, 8, 8, 8, 1, 1), ValueError, "n must be at least 1"),
        (lambda: ConvProblem(1, 8, 8, 8, 8, 1, 1, padding=-1), ValueError, "padding must be at least 0"),
        (lambda: ConvProblem(1, 8, 8, 8, 8, 1, 1, stride=0), ValueError, "stride must be at least 1"),
        (lambda: ConvProblem(1, 8, 4, 8, 8, 5, 1), ValueError, "spans 5 pixels of 4"),
        (lambda: explain(MODULE), TypeError, "input tensor"),
        (lambda: explain(nn.Sequential(nn.Conv2d(3, 4, 3))), TypeError, r"Sequential.*report\("),
        (lambda: explain(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 4, 4)), TypeError, r"Conv2d.*report\("),
        (lambda: explain(MODULE, torch.ones(1, 3, 4, 4)), RuntimeError, "4 channels, but got 3"),
        (lambda: explain(MODULE, torch.ones(1, 4, 4, 4).double()), RuntimeError, "should be the same"),
        (lambda: explain(MODULE, torch.ones(4, 4)), RuntimeError, "Expected 3D"),
        (lambda: explain(MODULE, torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 3)), RuntimeError, "residual"),
        (lambda: explain(MODULE, torch.ones(1, 4, 4, 4), 1), TypeError, "residual"),
        (lambda: explain(RESNET, torch.ones(1, 3, 9, 9)), ValueError, "of size"),
        (lambda: explain(RESNET, "image"), TypeError, "x must be"),
        (lambda: explain(RESNET, device=0), TypeError, "device must be"),
        (lambda: explain(RESNET, device="NVIDIA H100 PCIe"), ValueError, r"known are .*fused_cna\.Device"),
        (lambda: replace(RESNET, n=1.5), TypeError, "n must be an int"),
        (lambda: replace(RESNET, dtype="float16"), TypeError, "dtype"),
        (lambda: replace(RESNET, padding="same", stride=2), RuntimeError, "same"),
        (lambda: explain(RESNET, residual=torch.ones(1)), TypeError, "residual="),
        (lambda: replace(A10, compute_capability=(7, 5)), ValueError, "compute_capability"),
        (lambda: replace(A10, compute_capability=8.6), TypeError, "compute_capability"),
        (lambda: replace(A10, bandwidth_gbs=0), ValueError, "bandwidth_gbs must be positive"),
        (lambda: replace(A10, clock_ghz=float("inf")), ValueError, "finite"),
        (lambda: replace(A10, multiprocessors=1.5), TypeError, "multiprocessors"),
        (lambda: replace(A10, shared_per_block=1 << 20), ValueError, "shared_per_multiprocessor"),
    ],
)
def test_bad_questions(question: Callable[[], object], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        question()


def test_devices_by_name_and_by_figures() -> None:
    for name in ("a100", "rtx 4090", "H100/16", "h100/16", "nvidia l4", "NVIDIA GeForce RTX 4090"):
        assert name.lower().endswith(explain(RESNET, device=name).device.lower())
    explanation = explain(RESNET, device=A10)
    assert explanation.device == "A10"
    assert explanation.estimate_us > explain(RESNET, device="A100").estimate_us
    slower = explain(RESNET, device=replace(A10, multiprocessors=36)).estimate_us
    assert slower > 1.5 * explanation.estimate_us
    assert {c["illegal"] == "" for c in explanation.candidates if c["kernel"] == HOPPER} == {False}


def test_padding_is_that_of_the_call() -> None:
    module = ConvNormAct(64, 64)
    module.zero_pad = (0, 40, 0, 40)
    padded = ConvProblem(1, 64, 16, 16, 64, 3, 3, 1, (1, 41, 1, 41), dtype=torch.float32, channels_last=False)
    assert explain(module, torch.empty(1, 64, 16, 16)) == explain(padded)
    same = replace(RESNET, padding="same", dilation=2)
    assert explain(same) == explain(replace(same, padding=2)) != explain(replace(same, padding=1))


def test_a_problem_with_an_input_takes_its_strides() -> None:
    x = torch.empty(256, 256, 14, 14, dtype=torch.float16, device="meta")
    assert explain(RESNET, x).candidates[0]["convert_x"]
    assert not explain(RESNET, x.to(memory_format=torch.channels_last)).candidates[0]["convert_x"]


def test_a_misspelt_switch_or_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (lambda: setattr(fused_cna.config, "stict", True), lambda: fused_cna.config.stict):
        with pytest.raises(AttributeError, match="did you mean 'strict'"):
            wrong()
    with pytest.raises(TypeError, match="True or False"):
        fused_cna.config.strict = 1
    read = torch.compile(lambda x: x + 1 if fused_cna.config.strict else x, backend="eager")
    for strict in (False, True):
        monkeypatch.setattr(fused_cna.config, "strict", strict)
        assert read(torch.zeros(1)).item() == strict
    if find_extension():
        wrong_names = {
            "implicit_gem_sm80": "did you mean",
            "direct64x64": "did you mean",
            "implicit": "kernels are",
            "direct 64x64": "tile",
            "direct 64x64x32,": "tile",
            "cudnn 64x64x32": "tile",
        }
        for name, said in wrong_names.items():
            with pytest.raises(ValueError, match=said), forced_plan(name):
                pass
        for right in ("", "direct", "cudnn", "direct 64x64x32", "small_m 4x4x2048 lanes 128"):
            with forced_plan(right):
                pass


def real_layers() -> list[tuple[int, ConvProblem]]:
    """Every distinct convolution of 194 real networks, with how often it is used."""
    with LAYERS.open() as file:
        rows = [{k: int(v) if v.isdigit() else v for k, v in row.items()} for row in csv.DictReader(file)]
    return [
        (
            row["uses"],
            ConvProblem(
                8,
                row["cin"],
                row["h"],
                row["w"],
                row["cout"],
                row["kh"],
                row["kw"],
                stride=(row["stride_h"], row["stride_w"]),
                padding=(row["pad_h"], row["pad_w"]),
                dilation=(row["dil_h"], row["dil_w"]),
                groups=row["groups"],
            ),
        )
        for row in rows
    ]


def test_dense_layers_of_real_networks_run_on_tensor_cores() -> None:
    dense = [(uses, p) for uses, p in real_layers() if p.groups == 1 and p.c >= 8 and p.k >= 8]
    assert len(dense) > 2000
    total = sum(uses for uses, _ in dense)
    # layers of few output pixels have a kernel of their own
    others = [(uses, p) for uses, p in dense if explain(p).kernel not in (*ON_TENSOR_CORES, "small_m")]
    assert all(p.c % 2 for _, p in others), "only odd channel counts are left out"
    assert sum(uses for uses, _ in others) <= 0.01 * total
