"""The whole networks as a picture: how many times faster than the reference each route is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.model_cases import GOALS, Case
from bench.model_report import REFERENCE
from bench.model_result import ModelResult, ModelsResult
from bench.plot import pyplot, save
from bench.summary import LAUNCHES

BAR = 0.8


def plot_models(path: Path, result: ModelsResult, heading: str, note: str) -> Path:
    """One panel per way of launching: a group of bars for each case, a bar for each route, a line at 1.0.

    Returns `path`.
    """
    plt = pyplot()
    launches = result.launches
    panels = [[one for one in result.results if launch in one.references] for launch in launches]
    routes = [
        route
        for route in result.routes
        if any(one.speedup(route, launch) for launch in launches for one in result.results)
    ]
    bars = max(len(panel) for panel in panels) * (len(routes) + 1)
    size = (9.5 * len(launches), 2.2 + 0.17 * bars)
    figure, axes = plt.subplots(1, len(launches), figsize=size, squeeze=False, layout="constrained")
    for axis, launch, shown in zip(axes[0], launches, panels, strict=True):
        _draw_groups(axis, shown, routes, launch)
        if not result.on_gpu:
            _draw_goals(axis, shown)
        axis.set_title(f"{LAUNCHES[launch]}: {len(shown)} networks", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    said = f"Reference: {REFERENCE[result.on_gpu]}. {note}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, heading, said, len(launches))
    return path


def _draw_groups(axis: Any, shown: Sequence[ModelResult], routes: Sequence[str], launch: str) -> None:
    medians = [ratio.median for one in shown for route in routes if (ratio := one.speedup(route, launch))]
    # On a busy machine a whisker can be many bars long: it may not decide the scale.
    end_of_bars = 1.15 * max(1.0, *medians)
    height = BAR / len(routes)
    for index, route in enumerate(routes):
        ratios = [(place, one.speedup(route, launch)) for place, one in enumerate(shown)]
        drawn = [(place, ratio) for place, ratio in ratios if ratio is not None]
        axis.barh(
            [place - BAR / 2 + (index + 0.5) * height for place, _ in drawn],
            [ratio.median for _, ratio in drawn],
            height,
            xerr=(
                [ratio.median - ratio.low for _, ratio in drawn],
                [max(min(ratio.high, end_of_bars) - ratio.median, 0.0) for _, ratio in drawn],
            ),
            color=f"C{index}",
            error_kw={"ecolor": "#444444", "elinewidth": 0.9},
            label=route,
        )
    axis.axvline(1.0, color="black", linewidth=1.2)
    axis.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlim(0, end_of_bars)
    axis.set_xlabel(
        "time of the reference / time of the route (beyond 1.0 it is faster; whiskers: quartiles)", fontsize=8
    )
    axis.spines[["top", "right"]].set_visible(False)


def _draw_goals(axis: Any, shown: Sequence[ModelResult]) -> None:
    places = {one.case: place for place, one in enumerate(shown)}
    for goal in GOALS:
        place = places.get(Case(goal.network, goal.batch, "fp32"))
        if place is not None:
            axis.plot([goal.speedup] * 2, [place - BAR / 2, place + BAR / 2], "k:", linewidth=1.5)
