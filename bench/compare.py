"""Two results side by side: which rows got faster or slower from one file to the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import plot, report
from bench.layer_result import BASELINE, LayerResult
from bench.provenance import differences
from bench.stats import Summary, geometric_mean
from bench.summary import LAUNCHES
from bench.terminal import Console, make_table

MOST_ROWS = 40
CAVEAT = (
    "The two runs were not interleaved, so rows count as changed only where the quartiles do not overlap, "
    f"and the {BASELINE} of both runs, which no change of the kernels touches, says how much the machine "
    "changed."
)


@dataclass(frozen=True)
class Change:
    """Fused on one row in two runs. `ratio` is before / after: above 1 it got faster; `control` of eager."""

    name: str
    precision: str
    batch: int
    launch: str
    before: Summary
    after: Summary
    control: float | None

    @property
    def ratio(self) -> float:
        return self.before.median / self.after.median

    @property
    def verdict(self) -> str:
        if self.after.high < self.before.low:
            return "faster"
        return "slower" if self.after.low > self.before.high else "even"


@dataclass(frozen=True)
class Compared:
    """All rows that both files have, the one that got slowest first, and what only one of them has."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    differences: list[str]


def load_rows(path: Path) -> tuple[dict[str, Any], list[LayerResult]]:
    """The provenance and the rows of a results.json; ValueError if it holds no layers."""
    content = report.read_json(path)
    rows = content.get("layers", {}).get("rows")
    if not rows:
        raise ValueError(f"{path} holds no measured layers; it needs a results.json of the job layers")
    return content["provenance"], [LayerResult.from_json(row) for row in rows]


def compare_files(before: Path, after: Path, *, any_device: bool = False) -> Compared:
    """Match the rows of two results.json.

    Raises:
        ValueError: a file that cannot be read, no row that both have, or, without `any_device`, two devices.
    """
    (old, old_rows), (new, new_rows) = load_rows(before), load_rows(after)
    names = [provenance["device"]["name"] for provenance in (old, new)]
    if names[0] != names[1] and not any_device:
        raise ValueError(
            f"{before} was measured on {names[0]!r} and {after} on {names[1]!r}: times of different devices "
            "say nothing about a change; --any-device compares them all the same"
        )
    by_key = {row.row.key: row for row in old_rows}
    changes = [
        change for row in new_rows if row.row.key in by_key for change in _changes(by_key[row.row.key], row)
    ]
    if not changes:
        raise ValueError(f"{before} and {after} have no row in common: other layers, batches or dtypes")
    new_keys = {row.row.key for row in new_rows}
    return Compared(
        changes=sorted(changes, key=lambda change: change.ratio),
        only_before=[row.name for row in old_rows if row.row.key not in new_keys],
        only_after=[row.name for row in new_rows if row.row.key not in by_key],
        differences=differences(old, new),
    )


def _changes(before: LayerResult, after: LayerResult) -> list[Change]:
    changes = []
    for launch in LAUNCHES:
        if launch not in before.comparisons or launch not in after.comparisons:
            continue
        eager = [one.against_baseline.get(launch) for one in (before, after)]
        control = (
            None
            if eager[0] is None or eager[1] is None
            else eager[0].rival_seconds.median / eager[1].rival_seconds.median
        )
        times = (one.comparisons[launch].fused_seconds for one in (before, after))
        changes.append(Change(after.name, after.row.precision, after.row.batch, launch, *times, control))
    return changes


def print_compared(console: Console, compared: Compared) -> None:
    """What got slower first, by name; then means; then what got faster."""
    for difference in compared.differences:
        console.print(f"[yellow]differs:[/yellow] {difference}", highlight=False)
    _print_changes(console, compared.changes, "slower", "red")
    table = make_table(
        "fused, time before / after (above 1: got faster), geometric means", CAVEAT, dense=True
    )
    for column in ("launch", "dtype"):
        table.add_column(column)
    for column in ("batch", "rows", "fused", BASELINE, "faster/even/slower"):
        table.add_column(column, justify="right")
    keys = dict.fromkeys(
        (one.launch, one.precision, one.batch)
        for one in sorted(compared.changes, key=lambda one: (one.launch, one.precision, one.batch))
    )
    for key in keys:
        rows = [one for one in compared.changes if (one.launch, one.precision, one.batch) == key]
        controls = [one.control for one in rows if one.control is not None]
        verdicts = [one.verdict for one in rows]
        table.add_row(
            LAUNCHES[key[0]],
            key[1],
            str(key[2]),
            str(len(rows)),
            f"{geometric_mean([one.ratio for one in rows]):.3f}",
            f"{geometric_mean(controls):.3f}" if controls else "-",
            "/".join(str(verdicts.count(kind)) for kind in ("faster", "even", "slower")),
        )
    console.print(table)
    _print_changes(console, compared.changes[::-1], "faster", "green")
    for which, names in (("first", compared.only_before), ("second", compared.only_after)):
        if names:
            console.print(f"only in the {which} file: {len(names)} rows", highlight=False)


def _print_changes(console: Console, ordered: Sequence[Change], kind: str, color: str) -> None:
    changed = [one for one in ordered if one.verdict == kind]
    console.print(f"[bold]got {kind}: {len(changed) or 'none'}")
    for one in changed[:MOST_ROWS]:
        control = "" if one.control is None else f", {BASELINE} {one.control:.2f}"
        console.print(
            f"  {one.name} {LAUNCHES[one.launch]}: {one.ratio:.2f} "
            f"({one.before.median * 1e6:.1f} to {one.after.median * 1e6:.1f} us{control})",
            style=color,
            highlight=False,
            soft_wrap=True,
        )
    if len(changed) > MOST_ROWS:
        console.print(f"  and {len(changed) - MOST_ROWS} more")


def plot_compared(path: Path, compared: Compared, heading: str) -> None:
    """Bars of before / after, a panel per way of launching: the rows that changed most, at most 60."""
    plt = plot.pyplot()
    launches = [name for name in LAUNCHES if any(one.launch == name for one in compared.changes)]
    panels = [_most_changed([one for one in compared.changes if one.launch == name]) for name in launches]
    size = (9.5 * len(launches), 2.2 + 0.29 * max(len(panel) for panel in panels))
    figure, axes = plt.subplots(1, len(launches), figsize=size, squeeze=False, layout="constrained")
    for axis, launch, shown in zip(axes[0], launches, panels, strict=True):
        places = range(len(shown))
        axis.barh(places, [one.ratio for one in shown], color=[plot.COLORS[one.verdict] for one in shown])
        controls = [(one.control, place) for place, one in zip(places, shown, strict=True) if one.control]
        axis.plot(*zip(*controls, strict=True), "k|", markersize=9, label=f"{BASELINE}")
        axis.axvline(1.0, color="black", linewidth=1.2)
        axis.set_yticks(places, [f"{one.name}  {one.ratio:.2f}" for one in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(left=0)
        axis.set_title(f"{LAUNCHES[launch]}: {len(shown)} layers that changed most", fontsize=10)
        axis.set_xlabel("time of fused before / after (beyond 1.0 it got faster)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.save(figure, path, heading, CAVEAT, len(launches))


def _most_changed(changes: Sequence[Change]) -> list[Change]:
    most = sorted(changes, key=lambda one: -max(one.ratio, 1 / one.ratio))[: plot.MOST_BARS]
    return sorted(most, key=lambda one: one.ratio)
