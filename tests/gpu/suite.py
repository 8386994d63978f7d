"""The tests that need a GPU: ``python -m tests.gpu.suite RESULT [--again BEFORE] [PYTEST_ARGUMENT ...]``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.evidence import read_step, write_json

WORKERS = ("-n", "6", "--dist", "worksteal", "--max-worker-restart=50")


class Outcome:
    """A plugin that counts, remembers what failed and why, and writes it down at the end or an interrupt."""

    def __init__(self, result: Path) -> None:
        self.passed = 0
        self.failed: dict[str, str] = {}
        self._result = result
        self._start = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_keyboard_interrupt(self) -> None:
        self.write(stopped=True)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            where = getattr(report.longrepr, "reprcrash", None)
            message = where.message if where is not None else str(report.longrepr).strip()
            self.failed.setdefault(report.nodeid, message.partition("\n")[0][:300])

    def write(self, stopped: bool) -> None:
        said = {
            "passed": self.passed,
            "failed": self.failed,
            "stopped": stopped,
            "seconds": round(time.monotonic() - self._start, 1),
        }
        write_json(self._result, said)


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("result", type=Path)
    made.add_argument("--again", type=Path, help="only what failed by this JSON of a call")
    options, more = made.parse_known_args()
    outcome = Outcome(options.result)
    chosen = list(read_step(options.again, "tests").get("failed", {})) if options.again else []
    if options.again and not chosen:
        print("no test failed before")
        outcome.write(stopped=False)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = WORKERS if importlib.util.find_spec("xdist") else ()
    # A test that hangs is not reported when the run is stopped: after a while it says where it is.
    fixed = ("-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40")
    arguments = [*fixed, "--continue-on-collection-errors", *workers, *more, *chosen]
    status = pytest.main(arguments, plugins=[outcome])
    outcome.write(stopped=status == pytest.ExitCode.INTERRUPTED)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
