"""Every kernel, dtype and tile once, bit for bit, whatever some of them do.

``python -m tests.gpu.plans RESULT SECONDS [--again BEFORE]``. A worker runs one plan after the other and says
how each went. One that dies, hangs or loses the GPU is replaced by another, which goes on behind the plan at
fault, and takes the rest of that kernel's plans last.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fused_cna
from tests.families import plans_of_every_kernel
from tests.gpu.evidence import read_step, write_json
from tests.layouts import moved
from tests.plans import describe
from tests.reference import Problem, difference, expected_rounded

STARTS_WITHIN = 60.0
"""Seconds until a worker's first plan, on a machine that has yet to read torch from its disk."""

NO_TIME = "the time is over"


def list_cases() -> dict[str, tuple[Problem, str]]:
    """Every case by its name, in an order that is always the same."""
    return {describe(plan, p.x, p.weight): (p, plan) for p, plan in plans_of_every_kernel()}


def run_on_gpu(problem: Problem, plan: str) -> str:
    """Runs the plan on the GPU; how its result differs from the formula, empty where it does not.

    All but the convolution is computed on the CPU and copied, so that a tool which watches the GPU sees
    the kernel alone.
    """
    with fused_cna.forced_plan(plan), torch.inference_mode():
        actual = problem.map(lambda tensor: moved(tensor, "cuda")).call(fused_cna.conv_norm_act).cpu()
    return difference(actual, expected_rounded(problem))


def work() -> None:
    """Reads which cases to run from stdin, and says of each that it begins and how it ended."""
    fused_cna.config.strict = True
    todo, cases = json.load(sys.stdin), list_cases()
    torch.zeros(1).cuda()  # the GPU's first use takes seconds, which are no plan's
    for name in todo:
        print(json.dumps({"begins": name}), flush=True)
        try:
            error = run_on_gpu(*cases[name])
        except RuntimeError as raised:
            error = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0][:300]}"
        print(json.dumps({"ends": name, "error": error}), flush=True)
        if error:
            torch.cuda.synchronize()  # A GPU that is lost raises, and so ends this worker.


class Worker:
    """A process that runs cases, and the lines that it says."""

    def __init__(self, todo: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(todo))
        self.process.stdin.close()
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def say(self, seconds: float) -> dict[str, Any] | None:
        """What it says next, an empty dict at its end, or None where it says nothing for so long."""
        try:
            line = self._lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            return None
        return json.loads(line) if line else {}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def kernel_of(case: str) -> str:
    return case.partition(" ")[0]


def run_worker(todo: Sequence[str], end: float, patience: float, errors: dict[str, str]) -> tuple[str, str]:
    """Has one worker run cases, and notes their errors; where it ended, and why it did."""
    worker, case, wait = Worker(todo), "", STARTS_WITHIN
    while said := worker.say(min(wait, end - time.monotonic())):
        if "begins" in said:
            case = said["begins"]
        else:
            errors[said["ends"]] = said["error"]
        wait = patience
    if said is not None:
        return case, f"its process ended with status {worker.process.wait()}"
    worker.end()
    return case, NO_TIME if time.monotonic() >= end else f"hangs: nothing for {wait:.0f} s"


def run_all(todo: Sequence[str], seconds: float, patience: float) -> tuple[dict[str, str], str]:
    """Runs the cases; the error of each that was run, empty where it is right, and why others were not."""
    end = time.monotonic() + seconds
    errors: dict[str, str] = {}
    suspects: set[str] = set()
    while left := [case for case in todo if case not in errors]:
        left.sort(key=lambda case: kernel_of(case) in suspects)
        case, why = run_worker(left, end, patience, errors)
        if why == NO_TIME or not case:
            return errors, why
        errors.setdefault(case, why)
        suspects.add(kernel_of(case))
    return errors, ""


def counts_of(todo: Sequence[str], errors: dict[str, str]) -> dict[str, dict[str, int]]:
    """By kernel and dtype: how many cases there are, were run, were right."""
    counts: dict[str, dict[str, int]] = {}
    for case in todo:
        row = counts.setdefault(" ".join((kernel_of(case), dtype_of(case))), {"all": 0, "run": 0, "right": 0})
        row["all"] += 1
        row["run"] += case in errors
        row["right"] += errors.get(case) == ""
    return counts


def dtype_of(case: str) -> str:
    return next(word for word in case.split() if word in ("float32", "float16", "bfloat16"))


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("result", type=Path)
    made.add_argument("seconds", type=float)
    made.add_argument("--again", type=Path, help="only what was wrong or not run by this JSON of a call")
    made.add_argument("--limit", type=int, help="so many of each kernel and dtype at most")
    made.add_argument("--patience", type=float, default=15.0, help="seconds until a plan counts as hanging")
    options = made.parse_args()
    begin = time.monotonic()
    todo = list(list_cases())
    if options.again:
        before = read_step(options.again, "plans")
        again = {*before.get("wrong", {}), *before.get("not_run", ())}
        todo = [case for case in todo if case in again]
    if options.limit:
        alike: dict[tuple[str, str], list[str]] = {}
        for case in todo:
            alike.setdefault((kernel_of(case), dtype_of(case)), []).append(case)
        todo = [case for cases in alike.values() for case in cases[: options.limit]]
    errors, why = run_all(todo, options.seconds - (time.monotonic() - begin), options.patience)
    wrong = {case: error for case, error in errors.items() if error}
    said = {
        "not_done": why,
        "counts": counts_of(todo, errors),
        "wrong": wrong,
        "not_run": [case for case in todo if case not in errors],
    }
    write_json(options.result, said)
    for case, error in wrong.items():
        print(f"{case}: {error}")
    print(f"{len(errors)} of {len(todo)} plans run, {len(wrong)} wrong. {why}")
    return int(bool(wrong or why))


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        work()
    else:
        sys.exit(main())
