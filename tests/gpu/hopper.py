"""What the Hopper kernel takes for granted, asked of the hardware by hopper_probe.cu."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.gpu.sanitize import find_tool

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("hopper_probe.cu")
CONSTANTS = Path("csrc/kernels/implicit_gemm_sm90/hardware.h")
FLAGS = ("-std=c++20", "-O2", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")
LIMIT = 40.0
"""Seconds for each of the two programs, nvcc and the probe."""

Answers = dict[str, dict[str, str]]


class Assumption(NamedTuple):
    """How the names of the answers begin, the word, and what to change: a constant, or another place."""

    questions: str
    word: str
    change: str


ASSUMPTIONS = (
    Assumption("gathered_", "right", "multiplies_right"),
    Assumption("products_", "right", "maps_bring_operands"),
    Assumption("corner_order", "width first", "corners_begin_with_w"),
    Assumption("step_order", "width first", "the steps in csrc/device/tensor_map.cuh"),
    Assumption("output_", "right", "y_by_map and residual_by_map in launch.cuh, Staging in epilogue.cuh"),
    Assumption("cluster_", "right", "split_k in plan.cpp"),
    Assumption("registers", "right", "give_registers and take_registers in kernel.cuh"),
    Assumption("tf32_products_", "truncated", "Traits::rounds in operands.cuh"),
)
NO_ANSWER = ("fails", "hangs", "dies")


def contradictions(answers: Answers, constants: str) -> list[str]:
    """What to change in the code, with the answers that say so; `constants` is the text of hardware.h."""
    found = []
    for questions, word, change in ASSUMPTIONS:
        words = {name: one["answer"] for name, one in answers.items() if name.startswith(questions)}
        others = {name: other for name, other in words.items() if other != word}
        said = re.search(rf"\b{change} = (true|false);", constants)
        assumed = said is None or said[1] == "true"
        if not words:
            found.append(f"{questions}: no answer")
        elif assumed and others:
            shown = ", ".join(f"{name} {other}" for name, other in list(others.items())[:3])
            found.append(f"{shown} ({len(others)} of {len(words)}): change {change}")
        elif not assumed and not others:
            found.append(f"{questions} {word}: {change} need not be false")
    found += [
        f"{name} {one['answer']}: {one['seen']}"
        for name, one in answers.items()
        if one["answer"] in NO_ANSWER
    ]
    return found


def compilation(nvcc: str, program: Path) -> list[str]:
    return [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", str(PROBE), "-o", str(program)]


def run_program(command: list[str]) -> str:
    """What it prints, until it ends or its time does."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its processes write to the same pipe
            return str(process.communicate()[0])
    if process.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name}: status {process.returncode}, {errors.strip()}")
    return output


def answers_in(output: str) -> Answers:
    """Those of a probe that may not have ended: a line each."""
    lines = (line.strip().rstrip(",") for line in output.splitlines() if ": {" in line)
    return {name: answer for line in lines for name, answer in json.loads(f"{{{line}}}").items()}


def hopper() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    if (gpu.major, gpu.minor) != (9, 0):
        return {"text": f"not asked: compute capability {gpu.major}.{gpu.minor} is not 9.0"}
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError(f"there is no nvcc for {PROBE.name}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, PROBE.stem)
        run_program(compilation(nvcc, program))
        answers = answers_in(run_program([str(program)]))
    failures = contradictions(answers, (ROOT / CONSTANTS).read_text())
    map_rounding = f"maps of tf32: {answers.get('tf32_map', {}).get('answer', 'no answer')}"
    text = "; ".join([*failures, map_rounding]) if failures else f"all is as the code assumes; {map_rounding}"
    return {"answers": answers, "failures": failures, "text": text}
