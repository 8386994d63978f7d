"""Two results side by side: which of our times got shorter or longer from one file to the other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import plot
from bench.provenance import differences
from bench.report import clipped, print_table, say
from bench.result import LAUNCHES, Record, Summary, fastest, geometric_mean, read_json, read_records

MOST_ROWS = 40
CAVEAT = (
    "The two runs were not interleaved, so rows count as changed only where the quartiles do not overlap, "
    "and eager in both runs, which no change of the kernels touches, says how much the machine changed."
)


@dataclass(frozen=True)
class Change:
    """One of our routes in two runs. `ratio` is before / after: above 1 it got faster; `control` of eager."""

    name: str
    group: tuple[str, str, str, int]
    before: Summary
    after: Summary
    control: float | None

    @property
    def ratio(self) -> Summary:
        """With quartiles that lie on one side of 1 where those of the times do not overlap."""
        before, after = self.before, self.after
        ends = before.low / after.high, before.high / after.low
        return Summary(before.median / after.median, *ends, after.count)

    @property
    def line(self) -> str:
        eager = f", eager {self.control:.2f}" if self.control else ""
        times = f"{self.before.median * 1e6:.1f} to {self.after.median * 1e6:.1f} us"
        return f"{self.name} {LAUNCHES[self.group[1]]}: {self.ratio.median:.2f} ({times}{eager})"


@dataclass(frozen=True)
class Compared:
    """All that both files have, the one that got slowest first, and how many rows only one of them has."""

    changes: list[Change]
    only_before: int
    only_after: int
    differences: list[str]


def compare_files(before: Path, after: Path, *, any_device: bool = False) -> Compared:
    """Match the rows of two results.

    Raises:
        ValueError: a file that cannot be read, no row that both have, or, without `any_device`, two devices.
    """
    contents = {path: read_json(path) for path in (before, after)}
    provenances = [content["provenance"] for content in (contents[before], contents[after])]
    names = [one["device"]["name"] for one in provenances]
    if names[0] != names[1] and not any_device:
        raise ValueError(
            f"{before} was measured on {names[0]!r} and {after} on {names[1]!r}: times of different devices "
            "say nothing about a change; --any-device compares them all the same"
        )
    jobs = [read_records(path, contents[path]).values() for path in (before, after)]
    old, new = ({one.key: one for rows in found for one in rows} for found in jobs)
    changes = [change for key in new if key in old for change in _changes(old[key], new[key])]
    if not changes:
        raise ValueError(f"{before} and {after} have no row in common: other layers, batches or dtypes")
    changes.sort(key=lambda change: change.ratio.median)
    return Compared(changes, len(old.keys() - new), len(new.keys() - old), differences(*provenances))


def _changes(before: Record, after: Record) -> Iterator[Change]:
    """Of each of our routes, and each way of launching, that was right in both runs."""
    for route in dict.fromkeys(entry.route for entry in after.routes if entry.ours):
        for launch in LAUNCHES:
            ours = [fastest((e for e in one.routes if e.route == route), launch) for one in (before, after)]
            eager = [fastest((e for e in one.routes if e.eager), launch) for one in (before, after)]
            times = [entry.seconds[launch] for entry in ours if entry]
            controls = [entry.seconds[launch].median for entry in eager if entry]
            if len(times) == 2:
                name = after.name if after.kind == "layer" else f"{after.name} {route}"
                control = controls[0] / controls[1] if len(controls) == 2 else None
                yield Change(name, (after.kind, launch, after.precision, after.batch), *times, control)


def print_compared(console: Console, compared: Compared) -> None:
    """What got slower first, by name; then means; then what got faster."""
    say(console, [f"differs: {difference}" for difference in compared.differences], "yellow")
    rows = []
    for key in dict.fromkeys(sorted(one.group for one in compared.changes)):
        found = [one for one in compared.changes if one.group == key]
        controls = [one.control for one in found if one.control is not None]
        means = geometric_mean([one.ratio.median for one in found]), geometric_mean(controls or [1.0])
        verdicts = [one.ratio.verdict for one in found]
        counts = "/".join(str(verdicts.count(kind)) for kind in ("faster", "even", "slower"))
        words = (key[0], LAUNCHES[key[1]], key[2], str(key[3]), str(len(found)))
        rows.append((*words, *(f"{mean:.3f}" for mean in means), counts))
    slower, faster = (
        [one.line for one in ordered if one.ratio.verdict == kind]
        for kind, ordered in (("slower", compared.changes), ("faster", compared.changes[::-1]))
    )
    say(console, [f"got slower: {len(slower) or 'none'}", *clipped(slower, MOST_ROWS)], "red")
    columns = ("rows of", "<launch", "<dtype", "batch", "rows", "fused", "eager", "faster/even/slower")
    title = "fused, time before / after (above 1: got faster), geometric means"
    print_table(console, title, columns, rows, CAVEAT)
    say(console, [f"got faster: {len(faster) or 'none'}", *clipped(faster, MOST_ROWS)], "green")
    only = f"only in the first file: {compared.only_before} rows; in the second: {compared.only_after}"
    say(console, [only])


def plot_compared(path: Path, compared: Compared, heading: str) -> Path:
    """Bars of before / after, a panel per way of launching: the rows that changed most."""
    panels: plot.Bars = {}
    for launch in dict.fromkeys(one.group[1] for one in compared.changes):
        found = [one for one in compared.changes if one.group[1] == launch]
        most = sorted(found, key=lambda one: -max(one.ratio.median, 1 / one.ratio.median))[: plot.MOST_BARS]
        most.sort(key=lambda one: one.ratio.median)
        bars = [(one.name, one.ratio, f"eager {one.control or math.nan:.2f}") for one in most]
        panels[f"{LAUNCHES[launch]}: what changed most"] = bars
    return plot.plot_bars(path, panels, f"{heading}. {CAVEAT}", "time of fused before / after")
