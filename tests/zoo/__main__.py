"""The command line: python -m tests.zoo."""

import argparse
import queue
import sys
import threading
from collections.abc import Sequence
from fnmatch import fnmatch

from bench.terminal import Console, make_console, make_table
from fused_cna._progress import progress
from tests.zoo import results as kept_results
from tests.zoo.catalogue import NAMES
from tests.zoo.judge import Result
from tests.zoo.results import Kept, fingerprint, versions
from tests.zoo.summary import ADDS_GOAL, DOCUMENT, PAIRS_GOAL, Totals, document, failures, grouped
from tests.zoo.worker import Worker

_END = object()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description=f"Fuse {len(NAMES)} networks of torchvision and timm, compare each with the original, "
        "and count what was fused. Writes docs/zoo.md once all are judged.",
        epilog="Results are kept in build/zoo/results.jsonl until a source of fused_cna or of the zoo "
        "changes, so a run that was stopped goes on where it was. Exit status: 0; 1 if a network is wrong or "
        f"a goal is missed ({PAIRS_GOAL:.0%} of the foldable pairs, {ADDS_GOAL:.0%} of the residual adds in "
        "traceable networks); 2 if asked for what cannot be done.",
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
    names = options.only or NAMES
    forget = NAMES if options.fresh else options.only or ()
    frozen = not options.live
    kept = Kept(kept_results.PATH, fingerprint(frozen), frozenset(forget))
    console = make_console()
    missing = [name for name in names if name not in kept.results]
    if len(missing) < len(names):
        console.print(f"{len(names) - len(missing)} of {len(names)} networks were judged already")
    _judge_all(missing, options.workers, frozen, kept, console)
    results = [kept.results[name] for name in names]
    bad = failures(results)
    _print(results, console)
    if options.only is None:
        bad += Totals(results).shortfalls()
        DOCUMENT.write_text(document(results, versions(), frozen))
        console.print(f"written: {DOCUMENT}", highlight=False, soft_wrap=True)
    for line in bad:
        console.print(f"[red]{line}[/red]" if "[" not in line else line, highlight=False, soft_wrap=True)
    return 1 if bad else 0


def _judge_all(names: Sequence[str], count: int, frozen: bool, kept: Kept, console: Console) -> None:
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    workers = [Worker(frozen) for _ in range(min(count, len(names)))]
    threads = [threading.Thread(target=_work, args=(one, waiting, done), daemon=True) for one in workers]
    for thread in threads:
        thread.start()
    try:
        with progress("networks", len(names), shown=True) as step:
            running = len(threads)
            while running:
                outcome = done.get()
                if outcome is _END:
                    running -= 1
                elif isinstance(outcome, Result):
                    step(outcome.name)
                    kept.add(outcome)
                elif isinstance(outcome, BaseException):
                    raise outcome
    finally:
        for worker in workers:
            worker.close()


def _work(worker: Worker, waiting: "queue.SimpleQueue[str]", done: "queue.SimpleQueue[object]") -> None:
    try:
        while not waiting.empty():
            done.put(Result(**worker.judge(waiting.get_nowait())))  # type: ignore[arg-type]
    except queue.Empty:
        pass
    except BaseException as error:
        done.put(error)
    done.put(_END)


def _print(results: Sequence[Result], console: Console) -> None:
    totals = Totals(results)
    for what, missed in (
        ("foldable pairs not fused", [(r.name, r.missed_pairs) for r in results]),
        ("residual adds not fused", [(r.name, r.missed_adds) for r in results]),
    ):
        rows = grouped(missed)
        if rows:
            table = make_table(what, dense=True)
            table.add_column("number", justify="right")
            table.add_column("computed with the convolution, and the reason")
            table.add_column("such as")
            for reason, count, places in rows:
                table.add_row(str(count), reason, places[0])
            console.print(table)
    worst = max(results, key=lambda result: result.worst)
    for line in (
        f"convolutions: {totals.convolutions:,}",
        f"foldable pairs fused: {totals.pairs}",
        f"residual adds fused: {totals.adds}; in traceable networks: {totals.traceable.adds}",
        f"networks in which freeze=True folds all that is fused: {totals.frozen}",
        f"largest error: {worst.worst:.2f} of its bound, in {worst.name}",
        f"wrong networks: {len(totals.wrong)} of {len(results)}",
    ):
        console.print(line, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
