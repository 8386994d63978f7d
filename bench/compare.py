"""Two results side by side: which rows got faster or slower from one file to the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import plot, report
from bench.layer_result import BASELINE, LayerResult
from bench.model_result import ModelResult
from bench.model_routes import EAGER
from bench.provenance import differences
from bench.stats import Summary, geometric_mean
from bench.summary import LAUNCHES
from bench.terminal import Console, make_table

MOST_ROWS = 40
CAVEAT = (
    "The two runs were not interleaved, so rows count as changed only where the quartiles do not overlap, "
    f"and the {BASELINE} of both runs (of a network: {EAGER[1]}), which no change of the kernels touches, "
    "says how much the machine changed."
)


@dataclass(frozen=True)
class Change:
    """Fused on one row in two runs. `ratio` is before / after: above 1 it got faster; `control` of eager.

    A row is a layer, or with `what` "networks" one of our routes on a network.
    """

    name: str
    precision: str
    batch: int
    launch: str
    before: Summary
    after: Summary
    control: float | None
    what: str = "layers"

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


@dataclass(frozen=True)
class Measured:
    """What a result holds: where it comes from, its layers and its networks."""

    provenance: dict[str, Any]
    layers: list[LayerResult]
    networks: list[ModelResult]


def load_rows(path: Path) -> Measured:
    """What was measured; ValueError if that is neither a layer nor a network."""
    content = report.read_json(path)
    layers, networks = (content.get(job, {}).get("rows", ()) for job in ("layers", "models"))
    if not layers and not networks:
        raise ValueError(
            f"{path} holds no measured layers or networks; it needs a result of the jobs layers or models"
        )
    return Measured(
        content["provenance"],
        [LayerResult.from_json(row) for row in layers],
        [ModelResult.from_json(row) for row in networks],
    )


def compare_files(before: Path, after: Path, *, any_device: bool = False) -> Compared:
    """Match the rows of two results.

    Raises:
        ValueError: a file that cannot be read, no row that both have, or, without `any_device`, two devices.
    """
    old, new = load_rows(before), load_rows(after)
    names = [one.provenance["device"]["name"] for one in (old, new)]
    if names[0] != names[1] and not any_device:
        raise ValueError(
            f"{before} was measured on {names[0]!r} and {after} on {names[1]!r}: times of different devices "
            "say nothing about a change; --any-device compares them all the same"
        )
    old_layers, new_layers = ({row.row.key: row for row in one.layers} for one in (old, new))
    old_networks, new_networks = ({row.case: row for row in one.networks} for one in (old, new))
    changes = [
        *(c for key, row in new_layers.items() if key in old_layers for c in _changes(old_layers[key], row)),
        *(
            change
            for case, network in new_networks.items()
            if case in old_networks
            for change in _network_changes(old_networks[case], network)
        ),
    ]
    if not changes:
        raise ValueError(f"{before} and {after} have no row in common: other layers, batches or dtypes")
    return Compared(
        changes=sorted(changes, key=lambda change: change.ratio),
        only_before=_only_in(old_layers, new_layers) + _only_in(old_networks, new_networks),
        only_after=_only_in(new_layers, old_layers) + _only_in(new_networks, old_networks),
        differences=differences(old.provenance, new.provenance),
    )


def _only_in(rows: Mapping[Any, Any], others: Mapping[Any, Any]) -> list[str]:
    return [row.name for key, row in rows.items() if key not in others]


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
        times = [one.comparisons[launch].fused_seconds for one in (before, after)]
        changes.append(
            Change(after.name, after.row.precision, after.row.batch, launch, times[0], times[1], control)
        )
    return changes


def _network_changes(before: ModelResult, after: ModelResult) -> list[Change]:
    """Of each of our routes, and each way of launching, that was right in both runs."""
    changes = []
    eager = [one.entry(EAGER[1]) for one in (before, after)]
    for entry in after.entries:
        earlier = before.entry(entry.route)
        if not entry.ours or entry.refused or earlier is None or earlier.refused:
            continue
        for launch in LAUNCHES:
            if launch not in entry.seconds or launch not in earlier.seconds:
                continue
            medians = [one.seconds[launch].median for one in eager if one and launch in one.seconds]
            changes.append(
                Change(
                    f"{after.name} {entry.route}",
                    after.case.precision,
                    after.case.batch,
                    launch,
                    earlier.seconds[launch],
                    entry.seconds[launch],
                    medians[0] / medians[1] if len(medians) == 2 else None,
                    "networks",
                )
            )
    return changes


def print_compared(console: Console, compared: Compared) -> None:
    """What got slower first, by name; then means; then what got faster."""
    for difference in compared.differences:
        console.print(f"[yellow]differs:[/yellow] {difference}", highlight=False)
    _print_changes(console, compared.changes, "slower", "red")
    table = make_table(
        "fused, time before / after (above 1: got faster), geometric means", CAVEAT, dense=True
    )
    for column in ("rows of", "launch", "dtype"):
        table.add_column(column)
    for column in ("batch", "rows", "fused", "eager", "faster/even/slower"):
        table.add_column(column, justify="right")
    keys = dict.fromkeys(sorted((one.what, one.launch, one.precision, one.batch) for one in compared.changes))
    for key in keys:
        rows = [one for one in compared.changes if (one.what, one.launch, one.precision, one.batch) == key]
        controls = [one.control for one in rows if one.control is not None]
        verdicts = [one.verdict for one in rows]
        table.add_row(
            key[0],
            LAUNCHES[key[1]],
            key[2],
            str(key[3]),
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
        eager = BASELINE if one.what == "layers" else EAGER[1]
        control = "" if one.control is None else f", {eager} {one.control:.2f}"
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
        axis.plot(*zip(*controls, strict=True), "k|", markersize=9, label="eager")
        axis.axvline(1.0, color="black", linewidth=1.2)
        axis.set_yticks(places, [f"{one.name}  {one.ratio:.2f}" for one in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(left=0)
        axis.set_title(f"{LAUNCHES[launch]}: {len(shown)} rows that changed most", fontsize=10)
        axis.set_xlabel("time of fused before / after (beyond 1.0 it got faster)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.save(figure, path, heading, CAVEAT, len(launches))


def _most_changed(changes: Sequence[Change]) -> list[Change]:
    most = sorted(changes, key=lambda one: -max(one.ratio, 1 / one.ratio))[: plot.MOST_BARS]
    return sorted(most, key=lambda one: one.ratio)
