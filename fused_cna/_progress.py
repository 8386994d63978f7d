"""A progress bar on stderr where that is a terminal and rich is installed, else about ten lines of text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str], None]


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
    begun = 0

    def step(name: str) -> None:
        nonlocal begun
        if begun % max(1, total // 10) == 0:
            print(f"{title} {begun + 1} of {total}: {name}", file=sys.stderr, flush=True)
        begun += 1

    return step
