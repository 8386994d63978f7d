"""`python -m tests.simt` builds the simulator, says what it did, and measures what a thread switch costs."""

from __future__ import annotations

import sys
import time

from tests.simt import build
from tests.simt.binding import run_test_kernel


def main() -> int:
    for name, target in build.targets().items():
        if target.variant is build.COVERAGE:
            continue
        # one write per line, as two compilers report at once
        path = build.build(name, lambda line: print(f"{line}\n", end="", flush=True))
        print(f"{name}: {path.relative_to(build.ROOT)}")
    for threads in (128, 1024):
        print(f"{threads} threads: {_nanoseconds_per_switch(threads):.0f} ns per thread and barrier")
    return 0


def _nanoseconds_per_switch(threads: int) -> float:
    barriers = 1_000_000 // threads

    def seconds(count: int) -> float:
        start = time.perf_counter()
        run_test_kernel("barriers_only", [float(count)], threads)
        return time.perf_counter() - start

    seconds(0)
    return (seconds(barriers) - seconds(0)) / (barriers * threads) * 1e9


if __name__ == "__main__":
    sys.exit(main())
