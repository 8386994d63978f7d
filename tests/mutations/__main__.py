"""The command line: python -m tests.mutations."""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.mutations.faults import FAULTS, Fault
from tests.mutations.tree import Outcome, Result, Tree


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description=f"Plants {len(FAULTS)} faults in a copy of csrc/kernels, one at a time, builds the "
        "simulator there and runs the tests that are to see it. Takes half an hour on one core.",
        epilog="Exit status: 0; 1 if fewer faults were caught than are needed.",
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="with * for any characters")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    parser.add_argument("--need", type=int, default=38, metavar="N", help="how many to catch (default: 38)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if any(fnmatch(fault.name, pattern) for pattern in given.only)]
    if given.list:
        print(*(fault.name for fault in faults), sep="\n")
        return 0
    results = check(faults, given.workers)
    report(results, Console())
    if given.out:
        with given.out.open("w") as file:
            report(results, Console(file=file, width=200))
    caught = sum(result.outcome is Outcome.CAUGHT for result in results)
    return 0 if caught >= min(given.need, len(faults)) else 1


def check(faults: list[Fault], workers: int) -> list[Result]:
    """What becomes of each fault, in their order."""
    with ExitStack() as stack:
        trees: queue.Queue[Tree] = queue.Queue()
        for _ in range(workers):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-"))
            trees.put(Tree(Path(folder)))

        def run(fault: Fault) -> Result:
            tree = trees.get()
            try:
                return tree.run(fault)
            finally:
                trees.put(tree)

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        console = Console(stderr=True)
        results = []
        for result in track(pool.map(run, faults), "faults", len(faults), console=console):
            console.print(f"{result.outcome}: {result.fault.name}", markup=False)
            results.append(result)
        return results


def report(results: list[Result], console: Console) -> None:
    table = Table("fault", "outcome", "by", "seconds", title="Seeded faults in csrc/kernels")
    for fault, outcome, by, seconds in results:
        table.add_row(
            fault.name, outcome, by, f"{seconds:.0f}", style="" if outcome == Outcome.CAUGHT else "red"
        )
    console.print(table, markup=False)
    outcomes = Counter(result.outcome for result in results)
    console.print(f"{len(results)} faults:", ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))


if __name__ == "__main__":
    sys.exit(main())
