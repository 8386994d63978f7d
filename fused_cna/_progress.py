"""A progress bar on stderr where that is a terminal and rich is installed, else a few lines of text."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str], None]
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Step]:
    """Shows ``total`` steps; calling the yielded function names the step that begins."""
    if not shown:
        yield lambda name: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _lines(title, total)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total)
        return
    columns = (
        TextColumn(title),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun)
            begun += 1

        yield step


def _lines(title: str, total: int) -> Step:
    """A line for every tenth of the steps and every ten seconds, so that a log says how far a run came."""
    begun = 0
    start = shown = time.monotonic()

    def step(name: str) -> None:
        nonlocal begun, shown
        now = time.monotonic()
        if begun % max(1, total // 10) == 0 or now - shown >= SECONDS_BETWEEN_LINES:
            line = f"{title} {begun + 1} of {total}: {name} ({now - start:.0f} s)"
            print(line, file=sys.stderr, flush=True)
            shown = now
        begun += 1

    return step
