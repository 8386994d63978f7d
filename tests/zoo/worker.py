"""Processes that judge networks one after another, so that one that dies takes one network with it.

The child reads names from its standard input and writes a line of JSON for each to its standard output.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Seconds for one network, many times what the slowest takes.
LIMIT = 600


class Worker:
    """A child process, started when it is needed and again after it died."""

    def __init__(self, frozen: bool) -> None:
        self._frozen = frozen
        self._process: subprocess.Popen[str] | None = None

    def judge(self, name: str) -> dict[str, object]:
        """The fields of a `judge.Result`; a child that dies or takes too long is that network's error."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self._process = None
        status = process.wait()
        return {"name": name, "error": f"the process ended with status {status} (memory, or {LIMIT} s?)"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.zoo.worker", *(["--frozen"] if self._frozen else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )


def _serve(frozen: bool) -> None:
    from tests.zoo.judge import fuse_frozen, judge

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    warnings.simplefilter("ignore")
    # Whatever a library prints is not an answer.
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            result = judge(line.strip(), frozen=fuse_frozen if frozen else None)
            answers.write(json.dumps(asdict(result)) + "\n")
            answers.flush()
            # Networks are full of cycles, and some are gigabytes.
            gc.collect()


if __name__ == "__main__":
    _serve("--frozen" in sys.argv)
