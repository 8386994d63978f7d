"""The layers as bars: how many times faster than the best rival."""

import textwrap
from pathlib import Path
from typing import Any

from bench.layer_result import LAUNCHES, LayersResult

COLORS = {"slower": "#c0392b", "even": "#9aa0a6", "faster": "#2e7d4f"}
CHARACTERS_PER_PANEL = 105


def plot_layers(path: Path, result: LayersResult, heading: str, note: str) -> None:
    """Write a PNG with one panel per way of launching; the slowest layers at the top, and a line at 1.0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    launches = result.launches
    rows = max(len(result.ordered(launch)) for launch in launches)
    size = (8.5 * len(launches), 2.2 + 0.29 * rows)
    figure, axes = plt.subplots(1, len(launches), figsize=size, squeeze=False, layout="constrained")
    for axis, launch in zip(axes[0], launches, strict=True):
        _draw_panel(axis, result, launch)
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    wrapped = textwrap.fill(note, CHARACTERS_PER_PANEL * len(launches))
    figure.suptitle(f"{heading}\n{wrapped}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(axis: Any, result: LayersResult, launch: str) -> None:
    ordered = result.ordered(launch)
    comparisons = [one.comparisons[launch] for one in ordered]
    speedups = [comparison.speedup for comparison in comparisons]
    # On a busy machine a whisker can be many bars long: it may not decide the scale.
    end_of_bars = 1.15 * max(1.0, *(speedup.median for speedup in speedups))
    below = [speedup.median - speedup.low for speedup in speedups]
    above = [min(speedup.high, end_of_bars) - speedup.median for speedup in speedups]
    axis.barh(
        range(len(ordered)),
        [speedup.median for speedup in speedups],
        xerr=(below, above),
        color=[COLORS[comparison.verdict] for comparison in comparisons],
        error_kw={"ecolor": "#444444", "elinewidth": 0.9},
    )
    axis.axvline(1.0, color="black", linewidth=1.2)
    for index, (speedup, comparison) in enumerate(zip(speedups, comparisons, strict=True)):
        label = f"{speedup.median:.2f} against {comparison.rival}"
        axis.text(1.02 * end_of_bars, index, label, va="center", fontsize=7)
    axis.set_yticks(range(len(ordered)), [one.layer.name for one in ordered], fontsize=8)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.set_xlim(0, 1.35 * end_of_bars)
    axis.set_xlabel(
        "time of the best rival / time of fused (beyond 1.0 fused is faster; whiskers: quartiles)"
    )
    mean = result.summary(launch)["geometric_mean_speedup"]
    axis.set_title(f"{LAUNCHES[launch]}: geometric mean {mean:.2f}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
