"""Telling layers under Nsight Compute: ``python -m tests.gpu.profile OUT SECONDS``.

Leaves OUT/profile.json: of each layer's kernel the metrics that say what bounds it, what its warps wait for,
and the share of time and the instructions of a warp before, in and behind the products. All else that was
measured is in OUT/profile.ncu-rep, tens of megabytes.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.gpu.evidence import write_json
from tests.gpu.sanitize import find_tool

METRICS = (
    *("Duration", "SM Frequency", "DRAM Throughput", "L2 Cache Throughput", "L1/TEX Cache Throughput"),
    *("Executed Ipc Active", "L2 Hit Rate", "Achieved Occupancy", "Registers Per Thread", "Grid Size"),
    *("Dynamic Shared Memory Per Block", "Executed Instructions", "Warp Cycles Per Issued Instruction"),
)
"""Names on the page of details."""

PRODUCTS = re.compile(r"\bHMMA\b")


@dataclass(frozen=True)
class Layer:
    """A convolution with padding that keeps its pixels, in float16 at batch 32, and the plan to run."""

    plan: str
    channels: tuple[int, int]
    size: int
    filter: int = 1
    stride: int = 1
    groups: int = 1
    act: str = "relu"
    add: bool = False


LAYERS = (
    Layer("implicit_gemm_sm80 128x128x32 split 1 pointwise", (64, 256), 56),
    Layer("implicit_gemm_sm80 128x128x32 split 1 pointwise", (64, 256), 56, add=True),
    Layer("implicit_gemm_sm80 128x64x32 split 1 pointwise", (64, 64), 56),
    Layer("implicit_gemm_sm80 128x32x32 split 1 pointwise", (16, 96), 112, act="relu6"),
    Layer("implicit_gemm_sm80 128x32x32 split 1 pointwise", (16, 96), 112, act="silu"),
    Layer("implicit_gemm_sm80 256x128x32 split 1 masked", (128, 128), 80, 3),
    Layer("implicit_gemm_sm80 128x128x32 split 1 pointwise", (1024, 1024), 32),
    Layer("implicit_gemm_sm80 256x64x32 split 1 masked", (64, 64), 56, 3),
    Layer("grouped 256x64x16", (64, 64), 56, 3),
    Layer("grouped", (128, 128), 56, 3, groups=32),
    Layer("depthwise 147x48x9 3x3", (144, 144), 56, 3, groups=144, act="relu6"),
    Layer("depthwise_toeplitz", (672, 672), 14, 5, groups=672, act="silu"),
    Layer("stem", (3, 64), 224, 7, 2),
)


def run_layers() -> None:
    import torch

    import fused_cna

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)

    fused_cna.config.strict = True
    for layer in LAYERS:
        c, k = layer.channels
        q = layer.size // layer.stride
        x = random(32, c, layer.size, layer.size)
        weight = random(k, c // layer.groups, layer.filter, layer.filter)
        mean, var = torch.zeros(k, device="cuda"), torch.ones(k, device="cuda")
        residual = random(32, k, q, q) if layer.add else None
        with fused_cna.forced_plan(layer.plan), torch.inference_mode():
            for profiled in (False, True):
                torch.cuda.synchronize()
                if profiled:
                    torch.cuda.profiler.start()
                fused_cna.conv_norm_act(
                    x,
                    weight,
                    running_mean=mean,
                    running_var=var,
                    stride=layer.stride,
                    padding=layer.filter // 2,
                    groups=layer.groups,
                    act=layer.act,
                    residual=residual,
                )
                torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(layer, flush=True)


def read_details(text: str) -> Iterator[dict[str, str]]:
    """The metrics of each kernel, with their units, from the page of details."""
    for kernel in re.split(r"^  \S.*Context \d+, Stream", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"^    (\S.*?) {2,}(?:(\S+) +)?([\d.,]+) *$", kernel, re.MULTILINE)
        values = {name: f"{value} {unit}".strip() for name, unit, value in reversed(found)}
        yield {name: values[name] for name in METRICS if name in values}


def read_source(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Where each kernel spends its time, from the page of its instructions. It lists some kernels twice."""
    kernels: list[list[dict[str, str]]] = []
    header: list[str] = []
    for row in csv.reader(lines):
        if row and row[0] == "Kernel Name":
            kernels.append([])
        elif row and row[0] == "Address":
            header = row
        elif row and kernels:
            kernels[-1].append(dict(zip(header, row, strict=False)))
    for before, kernel in zip([[], *kernels], kernels, strict=False):
        if kernel and kernel != before:
            yield _where(kernel)


def _where(code: list[dict[str, str]]) -> dict[str, Any]:
    def total(column: str, part: list[dict[str, str]] = code) -> int:
        return sum(int(each[column] or 0) for each in part)

    samples, warps = max(total("# Samples"), 1), max(int(code[0]["Instructions Executed"]), 1)
    stalls = {name: total(name) / samples for name in code[0] if re.fullmatch(r"stall_\w+", name)}
    products = [
        i
        for i, each in enumerate(code)
        if PRODUCTS.search(each["Source"]) and each["Instructions Executed"] != "0"
    ]
    parts = {}
    if products:
        first, last = products[0], products[-1] + 1
        for name, part in (("before", code[:first]), ("products", code[first:last]), ("behind", code[last:])):
            executed = round(total("Instructions Executed", part) / warps, 1)
            parts[name] = {"time": round(total("# Samples", part) / samples, 3), "instructions": executed}
    longest = sorted(stalls, key=lambda name: -stalls[name])[:8]
    return {
        "stalls": {name.removeprefix("stall_"): round(stalls[name], 3) for name in longest},
        "parts": parts,
    }


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("out", type=Path, nargs="?")
    made.add_argument("seconds", type=float, nargs="?")
    made.add_argument(
        "--layers", action="store_true", help="run the layers themselves, without Nsight Compute"
    )
    options = made.parse_args()
    if options.layers:
        run_layers()
        return 0
    ncu = find_tool("ncu")
    if ncu is None:
        print("there is no ncu on PATH, beside nvcc, in CUDA_HOME or in /usr/local/cuda")
        return 1
    report = options.out / "profile.ncu-rep"
    # The clocks stay as they are: the machine is not ours alone to set.
    measure = (
        "--set",
        "full",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "-f",
        "-o",
        str(report),
    )
    layers = (sys.executable, "-m", __spec__.name, "--layers")
    try:
        status = subprocess.run([ncu, *measure, *layers], timeout=options.seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"not done after {options.seconds:.0f} s")
        return 124

    def page(*arguments: str) -> str:
        command = [ncu, "--import", str(report), "--page", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    details, source = read_details(page("details")), read_source(page("source", "--csv").splitlines())
    kernels = [
        {"layer": asdict(layer), "metrics": metrics, **where}
        for layer, metrics, where in zip(LAYERS, details, source, strict=False)
    ]
    write_json(options.out / "profile.json", {"kernels": kernels})
    print(f"{len(kernels)} of {len(LAYERS)} layers profiled")
    return status or int(len(kernels) < len(LAYERS))


if __name__ == "__main__":
    sys.exit(main())
