"""The layers as pictures: how many times faster than the best rival, and how near to the roofline."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.layer_result import LayerResult
from bench.summary import LAUNCHES, LayersResult

COLORS = {"slower": "#c0392b", "even": "#9aa0a6", "faster": "#2e7d4f"}
CHARACTERS_PER_PANEL = 100
MOST_BARS = 60
NEUTRAL = "#6b8cae"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_all(folder: Path, result: LayersResult, heading: str, note: str) -> list[Path]:
    """Write layers.png, suites.png and roofline.png; the paths."""
    drawings = (
        ("layers.png", plot_layers),
        ("suites.png", plot_suites),
        ("roofline.png", plot_roofline),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings:
        draw(folder / name, result, heading, note)
    return [folder / name for name, _ in drawings]


def pyplot() -> Any:
    """matplotlib without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path, heading: str, note: str, panels: int) -> None:
    """With the title above, wrapped to the width of the panels."""
    wrapped = textwrap.fill(note, CHARACTERS_PER_PANEL * panels)
    figure.suptitle(f"{heading}\n{wrapped}" if note else heading, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)


def plot_layers(path: Path, result: LayersResult, heading: str, note: str) -> None:
    """One panel per way of launching; the slowest rows at the top, at most 60 of them, a line at 1.0."""
    plt = pyplot()
    launches = result.launches
    rows = min(MOST_BARS, max(len(result.ordered(launch)) for launch in launches))
    size = (9.5 * len(launches), 2.2 + 0.29 * rows)
    figure, axes = plt.subplots(1, len(launches), figsize=size, squeeze=False, layout="constrained")
    for axis, launch in zip(axes[0], launches, strict=True):
        ordered = result.ordered(launch)
        _draw_bars(axis, ordered[:MOST_BARS], launch)
        which = (
            f"the {MOST_BARS} slowest of {len(ordered)}" if len(ordered) > MOST_BARS else f"{len(ordered)}"
        )
        axis.set_title(f"{LAUNCHES[launch]}: {which} layers", fontsize=10)
    _verdict_legend(figure)
    save(figure, path, heading, note, len(launches))


def _verdict_legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _draw_bars(axis: Any, shown: Sequence[LayerResult], launch: str) -> None:
    comparisons = [one.comparisons[launch] for one in shown]
    speedups = [comparison.speedup for comparison in comparisons]
    # On a busy machine a whisker can be many bars long: it may not decide the scale.
    end_of_bars = 1.15 * max(1.0, *(speedup.median for speedup in speedups))
    below = [speedup.median - speedup.low for speedup in speedups]
    above = [min(speedup.high, end_of_bars) - speedup.median for speedup in speedups]
    axis.barh(
        range(len(shown)),
        [speedup.median for speedup in speedups],
        xerr=(below, above),
        color=[COLORS[comparison.verdict] for comparison in comparisons],
        error_kw={"ecolor": "#444444", "elinewidth": 0.9},
    )
    axis.axvline(1.0, color="black", linewidth=1.2)
    for index, (speedup, comparison) in enumerate(zip(speedups, comparisons, strict=True)):
        label = f"{speedup.median:.2f} against {comparison.rival}"
        axis.text(1.02 * end_of_bars, index, label, va="center", fontsize=7)
    axis.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, 1.35 * end_of_bars)
    axis.set_xlabel(
        "time of the best rival / time of fused (beyond 1.0 fused is faster; whiskers: quartiles)", fontsize=8
    )
    axis.spines[["top", "right"]].set_visible(False)


def plot_suites(path: Path, result: LayersResult, heading: str, note: str) -> None:
    """Geometric mean of each suite and batch, a panel per way of launching and precision; worst layers."""
    plt = pyplot()
    groups = result.groups()
    panels = list(dict.fromkeys((group.launch, group.precision) for group in groups))
    columns = len({precision for _, precision in panels})
    lines = -(-len(panels) // columns)
    bars = max(sum((g.launch, g.precision) == panel for g in groups) for panel in panels)
    size = (8 * columns, 1.4 + lines * (1.0 + 0.27 * bars))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        shown = [group for group in groups if (group.launch, group.precision) == panel]
        places = range(len(shown))
        means = [group.geometric_mean for group in shown]
        axis.barh(places, means, color=NEUTRAL)
        axis.plot([group.worst_speedup for group in shown], places, "k|", markersize=9, label="worst layer")
        axis.plot(
            [group.speedup_of_sum for group in shown], places, "wo", mec="black", ms=5, label="summed time"
        )
        for place, group in zip(places, shown, strict=True):
            axis.annotate(
                f"{group.geometric_mean:.2f} ({group.measured} of {group.planned} layers)",
                (1.0, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
            )
        axis.axvline(1.0, color="black", linewidth=1.2)
        axis.set_yticks(places, [f"{group.suite}, batch {group.batch}" for group in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(left=0)
        axis.set_title(f"{panel[1]}, {LAUNCHES[panel[0]]}", fontsize=10)
        axis.set_xlabel("time of the best rival / time of fused, geometric mean over layers", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(figure, path, heading, note, columns)


def plot_roofline(path: Path, result: LayersResult, heading: str, note: str) -> None:
    """FLOP per byte against achieved TFLOP/s of fused, a panel per precision, with both measured ceilings.

    In a CUDA graph where there is one, as launching is not the device's work.
    """
    plt = pyplot()
    launch = result.launches[0]
    shown = result.ordered(launch)
    precisions = [name for name in result.ceilings if any(one.row.precision == name for one in shown)]
    suites = list(dict.fromkeys(suite for one in shown for suite in one.row.uses))
    batches = sorted({one.row.batch for one in shown})
    columns = min(2, len(precisions))
    lines = -(-len(precisions) // columns)
    size = (8 * columns, 0.6 + 5.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(precisions) :]:
        axis.set_axis_off()
    for axis, precision in zip(axes.flat, precisions, strict=False):
        points = [one for one in shown if one.row.precision == precision]
        for one in points:
            axis.plot(
                one.flops / one.least_bytes,
                one.flops / one.comparisons[launch].fused_seconds.median / 1e12,
                MARKERS[batches.index(one.row.batch) % len(MARKERS)],
                color=f"C{suites.index(next(iter(one.row.uses))) % 10}",
                markersize=5,
                alpha=0.75,
            )
        _draw_ceilings(axis, result.ceilings[precision], [one.flops / one.least_bytes for one in points])
        axis.set_title(f"{precision}: fused {LAUNCHES[launch]}, {len(points)} layers", fontsize=10)
    _suite_legend(figure, suites, batches)
    save(figure, path, heading, note, columns)


def _draw_ceilings(axis: Any, ceilings: Any, intensities: Sequence[float]) -> None:
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    low, high = min(0.5 * ridge, *intensities) / 2, 2 * max(2 * ridge, *intensities)
    peak = ceilings.flops_per_second / 1e12
    slope = ceilings.bytes_per_second / 1e12
    axis.plot([low, ridge], [low * slope, peak], color="black", linewidth=1.2)
    axis.plot([ridge, high], [peak, peak], color="black", linewidth=1.2)
    axis.text(high, peak, f"matrix product {peak:.3g} TFLOP/s", ha="right", va="bottom", fontsize=8)
    axis.annotate(
        f"copy {1e3 * slope:.4g} GB/s",
        (low, low * slope),
        xytext=(12, -2),
        textcoords="offset points",
        fontsize=8,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that must be moved")
    axis.set_ylabel("achieved TFLOP/s")
    axis.grid(which="major", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _suite_legend(figure: Any, suites: Sequence[str], batches: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=f"C{index % 10}", label=suite)
        for index, suite in enumerate(suites)
    ]
    handles += [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKERS[index % len(MARKERS)],
            color="#555555",
            label=f"batch {batch}",
        )
        for index, batch in enumerate(batches)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
