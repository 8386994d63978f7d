"""Results as pictures: how many times faster, and how near to the roofline."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.result import LAUNCHES, Outcome, Record, Summary

COLORS = {"slower": "#c0392b", "even": "#9aa0a6", "faster": "#2e7d4f"}
MOST_BARS = 60
MARKERS = "os^DvPX*"
Bars = dict[str, Sequence[tuple[str, Summary, str]]]
"""Of each panel the bars from the top: what is measured, the ratio, a word beside it."""


def pyplot() -> Any:
    """matplotlib without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path, heading: str, panels: int) -> Path:
    figure.suptitle("\n".join(textwrap.wrap(heading, 100 * panels)), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    return path


def plot_bars(path: Path, panels: Bars, heading: str, label: str) -> Path:
    """A panel for each key, a bar for each ratio, whiskers for its quartiles, a line at 1.0."""
    most = max(len(bars) for bars in panels.values())
    size = (9.5 * len(panels), 1.8 + 0.27 * most)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        ratios = [ratio for _, ratio, _ in bars]
        # On a busy machine a whisker can be many bars long: it may not decide the scale.
        end = 1.15 * max(1.0, *(ratio.median for ratio in ratios))
        whiskers = (
            [ratio.median - ratio.low for ratio in ratios],
            [max(min(ratio.high, end) - ratio.median, 0.0) for ratio in ratios],
        )
        color = [COLORS[ratio.verdict] for ratio in ratios]
        style = {"ecolor": "#444444", "elinewidth": 0.9}
        axis.barh(range(len(bars)), [r.median for r in ratios], xerr=whiskers, color=color, error_kw=style)
        axis.axvline(1.0, color="black", linewidth=1.2)
        for place, (_, ratio, beside) in enumerate(bars):
            axis.text(1.02 * end, place, f"{ratio.median:.2f} {beside}", va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, 1.35 * end)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"{label} (whiskers: quartiles)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path, heading, len(panels))


def plot_layers(folder: Path, outcome: Outcome, heading: str) -> list[Path]:
    """Write layers.png, suites.png and roofline.png; the paths."""
    slowest: Bars = {}
    suites: Bars = {}
    for launch in outcome.launches:
        shown = outcome.ordered(launch)
        slowest[f"{LAUNCHES[launch]}: the {min(len(shown), MOST_BARS)} slowest of {len(shown)}"] = [
            (one.name, one.comparisons[launch].speedup, f"to {one.comparisons[launch].rival}")
            for one in shown[:MOST_BARS]
        ]
        suites[f"{LAUNCHES[launch]}: geometric means; whiskers: from the worst layer"] = [
            (
                "{suite} {precision} n{batch}".format(**group),
                Summary(mean := group["geometric_mean"], group["worst_speedup"], mean, group["measured"]),
                "({measured} of {planned} layers)".format(**group),
            )
            for group in outcome.groups()
            if group["launch"] == launch
        ]
    label = "time of the fastest rival / time of fused"
    drawn = [plot_bars(folder / "layers.png", slowest, heading, label)]
    drawn += [plot_bars(folder / "suites.png", suites, heading, label)] if any(suites.values()) else []
    return [*drawn, plot_roofline(folder / "roofline.png", outcome, heading)]


def plot_networks(folder: Path, outcome: Outcome, heading: str) -> list[Path]:
    """Write models.png: every route of every network against eager."""
    panels: Bars = {
        f"networks, {LAUNCHES[launch]}": [
            (f"{one.name}, {entry.route}", ratio, "")
            for one in outcome.records
            for entry in one.routes
            if not entry.eager and (ratio := entry.speedups.get(launch))
        ]
        for launch in outcome.launches
    }
    label = "time of the faster eager layout / time of the route"
    return [plot_bars(folder / "models.png", panels, heading, label)]


def plot_roofline(path: Path, outcome: Outcome, heading: str) -> Path:
    """FLOP per byte against achieved TFLOP/s of fused, a panel per precision, with both measured ceilings.

    In a CUDA graph where there is one, as launching is not the device's work.
    """
    launch = outcome.launches[0]
    shown = outcome.ordered(launch)
    suites = list(dict.fromkeys(suite for one in shown for suite in one.uses))
    batches = sorted({one.batch for one in shown})
    names = [name for name in outcome.ceilings if any(one.precision == name for one in shown)]
    size = (8 * len(names), 6)
    figure, axes = pyplot().subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        points = [one for one in shown if one.precision == name]
        labels: set[str] = set()
        for one in points:
            suite = next(iter(one.uses))
            label = f"{suite} n{one.batch}"
            axis.plot(
                *_point(one, launch),
                MARKERS[batches.index(one.batch) % len(MARKERS)],
                color=f"C{suites.index(suite) % 10}",
                alpha=0.75,
                markersize=5,
                label="" if label in labels else label,
            )
            labels.add(label)
        ceilings = outcome.ceilings[name]
        peak, slope = ceilings["flops_per_second"] / 1e12, ceilings["bytes_per_second"] / 1e12
        ridge = peak / slope
        low = min(ridge, *(_point(one, launch)[0] for one in points)) / 2
        high = 2 * max(2 * ridge, *(_point(one, launch)[0] for one in points))
        axis.plot([low, ridge, high], [low * slope, peak, peak], color="black", linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="TFLOP/s")
        roof = f"matrix product {peak:.3g} TFLOP/s, copy {1e3 * slope:.4g} GB/s"
        axis.set_title(f"{name}: fused {LAUNCHES[launch]}, {len(points)} layers; {roof}", fontsize=9)
        axis.grid(which="major", linewidth=0.3)
        axis.legend(fontsize=7, frameon=False)
    return save(figure, path, heading, len(names))


def _point(one: Record, launch: str) -> tuple[float, float]:
    flops = one.facts["flops"]
    return flops / one.facts["least_bytes"], flops / one.comparisons[launch].seconds.median / 1e12
