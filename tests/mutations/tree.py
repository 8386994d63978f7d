"""A copy of the repository in which faults are planted, and what the tests make of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.locks import locked
from tests.mutations.faults import Fault, Selection
from tests.simt.build import FOLDER, ROOT

BUILT = FOLDER.relative_to(ROOT)


class Outcome:
    """What may become of a fault."""

    CAUGHT = "caught"
    SURVIVED = "survived"
    HUNG = "did not end"
    NOT_COMPILED = "does not compile"
    NOT_APPLIED = "no longer applies"
    NO_TESTS = "its tests fail without it"


class Result(NamedTuple):
    fault: Fault
    outcome: str
    by: str
    """The first test that failed, or why it is none of the tests."""
    seconds: float


class Tree:
    """A copy that has been built, and is as it was after every fault."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._clean = folder, folder / "clean"
        self._sound: dict[Selection, tuple[str, float]] = {}
        for name in ("csrc", "tests", "bench", "fused_cna"):
            shutil.copytree(ROOT / name, folder / name, copy_function=_copy)
        shutil.copy2(ROOT / "pyproject.toml", folder)
        with locked(FOLDER / "lock"):
            for variant in ("plain", "sanitized"):
                if (FOLDER / variant).exists():
                    shutil.copytree(FOLDER / variant, folder / BUILT / variant)
        # They name what was built, and from what, by whole paths.
        for record in (folder / BUILT).rglob("*.json"):
            record.write_text(record.read_text().replace(str(ROOT), str(folder)))

    def run(self, fault: Fault) -> Result:
        """Plants a fault and runs its tests, which must pass without it."""
        source = self._folder / "csrc" / "kernels" / fault.file
        text = source.read_text()
        if (found := text.count(fault.old)) != 1:
            return Result(fault, Outcome.NOT_APPLIED, f"the code is there {found} times", 0)
        failed, needed = self._without_fault(fault.tests)
        if failed:
            return Result(fault, Outcome.NO_TESTS, failed, needed)
        start = time.monotonic()
        source.write_text(text.replace(fault.old, fault.new))
        try:
            if error := self._build(fault.tests):
                outcome, by = Outcome.NOT_COMPILED, error
            else:
                by = self._test(fault.tests, timeout=60 + 10 * needed)
                outcome = Outcome.CAUGHT if by else Outcome.SURVIVED
        except subprocess.TimeoutExpired:
            outcome, by = Outcome.HUNG, ""
        finally:
            source.write_text(text)
            _copy_changed(self._clean, self._folder / BUILT)
        return Result(fault, outcome, by, time.monotonic() - start)

    def _without_fault(self, tests: Selection) -> tuple[str, float]:
        """The first of the tests that fails without a fault, if any does, and the seconds that they take."""
        if tests not in self._sound:
            if error := self._build(tests):
                raise RuntimeError(f"The simulator does not build without a fault: {error}")
            _copy_changed(self._folder / BUILT, self._clean)
            start = time.monotonic()
            self._sound[tests] = self._test(tests, timeout=3600), time.monotonic() - start
        return self._sound[tests]

    def _build(self, tests: Selection) -> str:
        """Builds what the tests run; the compiler's first error where it refuses."""
        # In one process, as several trees may build at a time.
        code = "import sys; from tests.simt import build; build.PROCESSES = 1; build.build(sys.argv[1])"
        for target in tests.targets:
            ended = self._python(3600, "-c", code, target)
            if ended.returncode:
                return next(line for line in ended.stderr.splitlines()[::-1] if "rror:" in line)
        return ""

    def _test(self, tests: Selection, timeout: float) -> str:
        """The first test that fails, or how pytest ended without a failure; empty where all pass."""
        options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu")
        ended = self._python(timeout, "-m", "pytest", *options, *tests.arguments)
        if failed := re.search(r"^(?:FAILED|ERROR) tests/\S+?::(.+?)(?: - |$)", ended.stdout, re.MULTILINE):
            return failed[1]
        return f"exit status {ended.returncode}" if ended.returncode else ""

    def _python(self, timeout: float, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, timeout=timeout
        )


def _copy(source: str, destination: str) -> None:
    """A copy, but for extensions, which are large and never written."""
    if source.endswith(".so"):
        os.symlink(source, destination)
    else:
        shutil.copy2(source, destination)


def _copy_changed(source: Path, destination: Path) -> None:
    """Makes files as they are in `source`: those that have another time there."""
    for path in source.rglob("*"):
        to = destination / path.relative_to(source)
        if path.is_file() and not (to.exists() and to.stat().st_mtime_ns == path.stat().st_mtime_ns):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)
