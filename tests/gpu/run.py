"""Runs the steps of a call, one after the other, and keeps what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.calls import Call, Step
from tests.gpu.evidence import write_json
from tests.gpu.summary import summarise

ROOT = Path(__file__).resolve().parents[2]

GRACE = 18.0
"""Seconds between an interrupt, for a step to say what it has, and its end: xdist gives its workers 10."""

EARLY = 8.0
"""How long before its limit a step that counts its own time should end."""

LOG_BYTES = 1 << 21
"""What is kept of the output of a step: its first and last half."""


def run_call(name: str, call: Call, out: Path, before: Path) -> int:
    """Runs a call, writes OUT/NAME.json and OUT/NAME.log, prints the summary; 0 if all went well."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + call.seconds
    steps: dict[str, dict[str, Any]] = {}
    with open(out / f"{name}.log", "w+b") as log, tempfile.TemporaryDirectory() as folder:
        for step in call.steps:
            left = end - time.monotonic() - GRACE
            if why := _why_not(step, left, steps):
                steps[step.name] = {"skipped": why}
            else:
                log.write(f"==== {step.name}\n".encode())
                words = {"out": out, "before": before, "result": Path(folder, f"{step.name}.json")}
                steps[step.name] = _run_step(step, min(step.limit, left), words, log)
            print(_line(step.name, steps[step.name]), flush=True)
            write_json(out / f"{name}.json", {"call": name, "steps": steps})
        text = summarise(name, steps)
        log.write(f"==== summary\n{text}\n".encode())
    print(text, flush=True)
    return int(any(step.get("status") for step in steps.values()))


def _why_not(step: Step, left: float, before: dict[str, dict[str, Any]]) -> str:
    if left < max(step.least, 1.0):
        return f"{max(left, 0):.0f} s are left"
    if step.needs_kernels and before.get("extension", {}).get("status"):
        return "there are no kernels to run"
    return ""


def _line(name: str, step: dict[str, Any]) -> str:
    if "skipped" in step:
        return f"{name}: not run, {step['skipped']}"
    stopped = ", stopped" if step["stopped"] else ""
    return f"{name}: {step['seconds']:.0f} of {step['limit']:.0f} s{stopped}, status {step['status']}"


def _run_step(step: Step, limit: float, words: dict[str, Path], log: Any) -> dict[str, Any]:
    seconds = f"{max(limit - EARLY, 1):.0f}"
    command = [argument.format(**words, seconds=seconds) for argument in step.command]
    log.flush()
    begin, start = log.tell(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    stopped = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE - 3)
    finally:
        _end_session(process)
    done: dict[str, Any] = {
        "status": process.returncode,
        "stopped": stopped,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
    }
    output = _clip(log, begin)
    if step.tail:
        done["tail"] = output.decode(errors="replace").splitlines()[-step.tail :]
    try:
        done["result"] = json.loads(words["result"].read_text())
    except (OSError, ValueError):
        if "{result}" in step.command:
            done["status"] = done["status"] or 1
            done["tail"] = output.decode(errors="replace").splitlines()[-6:]
    return done


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever the step started and left, too: it would hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _clip(log: Any, begin: int) -> bytes:
    """Takes the middle out of a step's output where that is too long, and returns what is left of it."""
    log.seek(begin)
    output: bytes = log.read()
    if len(output) > LOG_BYTES:
        half = LOG_BYTES // 2
        output = output[:half] + b"\n... the middle is left out ...\n" + output[-half:]
        log.seek(begin)
        log.truncate()
        log.write(output)
    return output
