"""The job models in tables, how many times faster and the same answers?, and in a summary with the goals."""

from collections.abc import Callable

from bench.layer_report import COLORS
from bench.model_result import ModelResult, ModelsResult
from bench.model_routes import EAGER
from bench.report import clipped, ratio_text
from bench.stats import verdict
from bench.summary import LAUNCHES
from bench.terminal import Console, make_table

REFERENCE = {
    True: "the fastest route that is not ours, launched the same way",
    False: "the faster of the two eager layouts",
}
GOAL_WORDS = {True: "reached", False: "not reached", None: "not measured"}
MOST_NETWORKS = 10


def print_models(console: Console, result: ModelsResult) -> None:
    """The tables of a run."""
    for launch in result.launches:
        _print_matrix(
            console,
            result,
            f"networks, {LAUNCHES[launch]}: time of the reference / time of the route (quartiles)",
            f"reference: {REFERENCE[result.on_gpu]}; above 1 the route is faster",
            lambda one, route, launch=launch: _ratio_cell(one, route, launch),  # type: ignore[misc]
        )
    if result.results:
        _print_matrix(
            console,
            result,
            "networks: the same answers? (largest relative error of an image to float64, top-1 agreement)",
            "top-1: images, for the segmenter pixels, for the detector anchors, with the class that float64 "
            "gives them; weights are random, so classes lie close together",
            _answer_cell,
        )
        _print_setup(console, result)
    _print_gaps(console, result)


def models_summary(result: ModelsResult) -> list[str]:
    """How many times faster than the reference, the best way of launching of each network, and the goals."""
    lines = [f"networks: {len(result.results)} measured, {len(result.left_out)} left out"]
    lines += clipped([line for one in result.results for line in _network_lines(one)], MOST_NETWORKS)
    for goal in result.goals:
        measured = f": {goal.measured}" if goal.measured else ""
        lines += clipped([f"goal: {goal.goal}: {GOAL_WORDS[goal.reached]}{measured}"])
    return lines


def _network_lines(one: ModelResult) -> list[str]:
    launch = next((launch for launch in LAUNCHES if launch in one.references), None)
    if launch is None:
        return []
    ratios = {entry.route: one.speedup(entry.route, launch) for entry in one.entries}
    said = (f"{route} {ratio.median:.2f}" for route, ratio in ratios.items() if ratio is not None)
    return [f"{one.name}, {LAUNCHES[launch]}: {', '.join(said)}"]


def _print_matrix(
    console: Console,
    result: ModelsResult,
    title: str,
    caption: str | None,
    cell: Callable[[ModelResult, str], str],
) -> None:
    """A row for each case, a column for each route that any case was measured with."""
    routes = [route for route in result.routes if any(_was_tried(one, route) for one in result.results)]
    table = make_table(title, caption, dense=True)
    table.add_column("network", no_wrap=True)
    for route in routes:
        table.add_column(route, justify="right")
    for one in result.results:
        table.add_row(one.name, *(cell(one, route) for route in routes))
    console.print(table)


def _was_tried(one: ModelResult, route: str) -> bool:
    entry = one.entry(route)
    return entry is not None and entry.left_out is None


def _ratio_cell(one: ModelResult, route: str, launch: str) -> str:
    if one.references.get(launch) == route:
        return "[bold]reference[/]"
    speedup = one.speedup(route, launch)
    return "-" if speedup is None else f"[{COLORS[verdict(speedup)]}]{ratio_text(speedup)}[/]"


def _answer_cell(one: ModelResult, route: str) -> str:
    entry = one.entry(route)
    if entry is None or entry.error is None:
        return "-"
    text = f"{entry.error:.1e}" if entry.agreement is None else f"{entry.error:.1e} {entry.agreement:.1%}"
    return text if entry.refused is None else f"[red]{text}[/]"


def _print_setup(console: Console, result: ModelsResult) -> None:
    """What fusing found, and how long fusing and compiling took."""
    table = make_table("networks: seconds to prepare (fuse, compile, first call)", dense=True)
    routes = [
        route
        for route in result.routes
        if route not in EAGER and any(_was_tried(one, route) for one in result.results)
    ]
    table.add_column("network", no_wrap=True)
    table.add_column("image", justify="right")
    table.add_column("convolutions fused", justify="right")
    for route in routes:
        table.add_column(route, justify="right")
    for one in result.results:
        seconds = [entry.setup_seconds if (entry := one.entry(route)) else None for route in routes]
        cells = ("-" if value is None else f"{value:.2g}" for value in seconds)
        table.add_row(one.name, str(one.image_size), _fused_text(one), *cells)
    console.print(table)


def _fused_text(one: ModelResult) -> str:
    counted = [entry for entry in one.entries if entry.conv_calls is not None]
    return f"{counted[0].fused_calls} of {counted[0].conv_calls}" if counted else "-"


def _print_gaps(console: Console, result: ModelsResult) -> None:
    """What is not in the numbers, and what is to be known about them: each reason with all it is true of."""
    if result.resumed:
        console.print(f"{result.resumed} networks were measured in the run that this one resumes")
    said = [("left out", reason, name) for name, reason in result.left_out.items()]
    for one in result.results:
        for entry in one.entries:
            kinds = (
                ("left out", entry.left_out),
                ("not timed", entry.refused),
                ("not in a CUDA graph", entry.no_graph),
                *(("note", note) for note in entry.notes),
            )
            said += [(kind, reason, f"{one.name} {entry.route}") for kind, reason in kinds if reason]
    for kind, reason in dict.fromkeys((kind, reason) for kind, reason, _ in said):
        names = ", ".join(name for *why, name in said if why == [kind, reason])
        console.print(f"{kind}: {names}: {reason}", highlight=False, soft_wrap=True)
    for source in dict.fromkeys(one.images for one in result.results):
        console.print(f"images: {source}", highlight=False)
