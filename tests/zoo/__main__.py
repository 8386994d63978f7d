"""The command line: python -m tests.zoo."""

import argparse
import queue
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch

from bench.report import make_console
from fused_cna._progress import progress
from tests.zoo.catalogue import NAMES
from tests.zoo.judge import Result
from tests.zoo.results import Kept, versions
from tests.zoo.summary import (
    ADDS_GOAL,
    DOCUMENT,
    PAIRS_GOAL,
    document,
    failures,
    not_fused,
    shortfalls,
    totals,
)
from tests.zoo.worker import Worker


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description=f"Fuse {len(NAMES)} networks of torchvision and timm, compare each with the original, "
        "and count what was fused. Writes docs/zoo.md once all are judged.",
        epilog="Results are kept in build/zoo/results.jsonl until a source of fused_cna or of the zoo "
        "changes, so a run that was stopped goes on where it was. Exit status: 0; 1 if a network is wrong or "
        f"a goal is missed ({PAIRS_GOAL:.0%} of the foldable pairs, {ADDS_GOAL:.0%} of the residual adds); "
        "2 if asked for what cannot be done.",
    )
    made.add_argument(
        "--only",
        type=_names,
        metavar="NAMES",
        help="judge only these, again if they were; names as in tests/zoo/networks.txt with commas, * and ? "
        "for any characters, such as 'tv/resnet18,timm/regnet*'. docs/zoo.md is left as it is",
    )
    made.add_argument("--fresh", action="store_true", help="forget the results that are kept")
    made.add_argument(
        "--live", action="store_true", help="leave out the comparison with freeze=True; docs/zoo.md says so"
    )
    made.add_argument(
        "--workers", type=_positive, default=2, metavar="N", help="networks at a time, 1 or more (default: 2)"
    )
    return made


def _names(text: str) -> tuple[str, ...]:
    found: list[str] = []
    for pattern in text.split(","):
        matching = [name for name in NAMES if fnmatch(name, pattern.strip())]
        if not matching:
            raise argparse.ArgumentTypeError(f"no network is called {pattern!r}; see tests/zoo/networks.txt")
        found += matching
    return tuple(dict.fromkeys(found))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what is not judged yet, print, write; the exit status."""
    options = parser().parse_args(arguments)
    names, frozen = options.only or NAMES, not options.live
    kept = Kept(frozen, frozenset(NAMES if options.fresh else options.only or ()))
    console = make_console()
    missing = [name for name in names if name not in kept.results]
    if len(missing) < len(names):
        console.print(f"{len(names) - len(missing)} of {len(names)} networks were judged already")
    _judge_all(missing, options.workers, frozen, kept)
    results = [kept.results[name] for name in names]
    bad = failures(results)
    worst = max(results, key=lambda result: result.worst)
    lines = [*not_fused(results), *(f"{what}: {value}" for what, value in totals(results, frozen))]
    lines.append(f"largest error: {worst.worst:.2f} of its bound, in {worst.name}")
    if options.only is None:
        bad += shortfalls(results)
        DOCUMENT.write_text(document(results, versions(), frozen))
        lines.append(f"written: {DOCUMENT}")
    for line in (*lines, *bad):
        console.print(
            line, highlight=False, soft_wrap=True, markup=False, style="red" if line in bad else None
        )
    return 1 if bad else 0


def _judge_all(names: Sequence[str], count: int, frozen: bool, kept: Kept) -> None:
    workers = [Worker(frozen) for _ in range(count)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def judge(name: str) -> Result:
        worker = idle.get()
        try:
            return worker.judge(name)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)
    try:
        with progress("networks", len(names), shown=True) as step:
            for done in as_completed([pool.submit(judge, name) for name in names]):
                step(done.result().name)
                kept.add(done.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
