"""Tables, progress and the JSON file."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.layer_result import BASELINE, LAUNCHES, Comparison, LayerResult, LayersResult
from bench.overhead import Overhead
from bench.pipeline import NetworkResult
from bench.stats import Summary

SCHEMA = 1
WIDTH_WITH_ERRORS = 116
ABOVE_THE_ROOF = (
    "roofline above 100%: data stayed in a cache, or other work ran as the ceilings were measured"
)
COLORS = {"slower": "red", "even": "default", "faster": "green"}


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of `total` steps; calling the yielded function names the step that begins."""
    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("", total=total, title=title)
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun)
            begun += 1

        yield step
        bar.update(task, description="done", completed=begun)


def time_text(summary: Summary) -> str:
    """Median and quartile distance with a unit that reads well: '12.3 ±0.4 us'."""
    unit, factor = ("us", 1e6) if summary.median < 1e-3 else ("ms", 1e3)
    return f"{summary.median * factor:.4g} ±{summary.spread * factor:.2g} {unit}"


def ratio_text(summary: Summary) -> str:
    return f"{summary.median:.2f} ({summary.low:.2f}-{summary.high:.2f})"


def print_pipeline(console: Console, results: list[NetworkResult]) -> None:
    """One row per network and way of launching."""
    table = Table(title="pipeline: whole networks on photographs, every Conv2dNormActivation replaced")
    for column in ("network", "batch", "replaced", "launch"):
        table.add_column(column)
    for column in ("before", "after", "before / after"):
        table.add_column(column, justify="right")
    for result in results:
        for launch, latency in result.latency.items():
            table.add_row(
                result.network,
                str(result.batch),
                f"{result.layers_replaced} (of {result.convolutions} convs)",
                launch,
                time_text(latency.before),
                time_text(latency.after),
                ratio_text(latency.speedup),
            )
    console.print(table)
    answers = Table(title="pipeline: the same answers? (largest relative error of an image's logits)")
    for column in ("network", "fused / float64", "eager / float64", "fused / eager", "top-1 agreement"):
        answers.add_column(column, justify="left" if column == "network" else "right")
    for result in results:
        answers.add_row(
            result.network,
            f"{result.fused_error:.2e}",
            f"{result.eager_error:.2e}",
            f"{result.fused_against_eager:.2e}",
            f"{result.top1_agreement:.1%}",
        )
    console.print(answers)


def print_layers(console: Console, result: LayersResult) -> None:
    """What lost first, by name; then all layers, slowest against its rival first; then the counts."""
    ceilings = result.ceilings
    console.print(
        f"ceilings measured in this run: copy {ceilings.bytes_per_second / 1e9:.1f} GB/s (read + written), "
        f"matrix product {ceilings.flops_per_second / 1e12:.3g} TFLOP/s ({ceilings.matrix_precision})"
    )
    for launch in result.launches:
        _print_losses(console, result, launch)
    for launch in result.launches:
        _print_layer_table(console, result, launch)
    for launch in result.launches:
        summary = result.summary(launch)
        counts = ", ".join(f"{len(summary[kind])} {kind}" for kind in ("faster", "even", "slower"))
        console.print(
            f"{LAUNCHES[launch]}: geometric mean of best rival / fused "
            f"{summary['geometric_mean_speedup']:.3f}; {counts}"
        )
    if any(
        one.comparisons[launch].roofline_share > 1
        for launch in result.launches
        for one in result.ordered(launch)
    ):
        console.print(ABOVE_THE_ROOF)
    if result.left_out:
        console.print(f"left out, the budget was spent: {', '.join(result.left_out)}")


def _print_losses(console: Console, result: LayersResult, launch: str) -> None:
    slower = [one for one in result.ordered(launch) if one.comparisons[launch].verdict == "slower"]
    console.print(f"[bold]slower than the best rival, {LAUNCHES[launch]}: {len(slower) or 'none'}")
    for one in slower:
        comparison = one.comparisons[launch]
        console.print(
            f"  {one.layer.name}: {comparison.speedup.median:.2f} of {comparison.rival}",
            style="red",
            highlight=False,
        )


def _print_layer_table(console: Console, result: LayersResult, launch: str) -> None:
    wide = console.width >= WIDTH_WITH_ERRORS
    table = Table(
        title=f"layers: {result.suite} suite, {LAUNCHES[launch]}, slowest first (ratio: rival / fused)",
        caption=None if wide else f"errors are in results.json, and here in {WIDTH_WITH_ERRORS} columns",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("layer")
    for column in ("fused us", "rival us", "ratio", "quartiles", "roofline"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("best rival", no_wrap=True)
    if wide:
        for column in ("error", "eager's"):
            table.add_column(column, justify="right", no_wrap=True)
    for one in result.ordered(launch):
        cells = _layer_cells(one, one.comparisons[launch])
        table.add_row(*(cells + _error_cells(one) if wide else cells))
    console.print(table)


def _layer_cells(one: LayerResult, comparison: Comparison) -> tuple[str, ...]:
    speedup = comparison.speedup
    return (
        one.layer.name,
        f"{comparison.fused_seconds.median * 1e6:.1f}",
        f"{comparison.rival_seconds.median * 1e6:.1f}",
        f"[{COLORS[comparison.verdict]}]{speedup.median:.2f}[/]",
        f"{speedup.low:.2f}-{speedup.high:.2f}",
        f"{comparison.roofline_share:.0%} {one.floor.bound}",
        comparison.rival,
    )


def _error_cells(one: LayerResult) -> tuple[str, ...]:
    errors = (one.largest_error(ours=True), one.largest_error(ours=False, route=BASELINE))
    return tuple("-" if error is None else f"{error:.1e}" for error in errors)


def print_overhead(console: Console, result: Overhead) -> None:
    """Host time per call, and the goal as information."""
    table = Table(title="overhead: host time per call, 1x16x8x8, eval, inference mode")
    for column in (
        "fused",
        "three modules",
        "one hand-written module",
        "fused / three",
        "fused / hand-written",
    ):
        table.add_column(column, justify="right")
    table.add_row(
        time_text(result.fused),
        time_text(result.three_modules),
        time_text(result.hand_written),
        ratio_text(result.ratio),
        ratio_text(result.ratio_to_hand_written),
    )
    console.print(table)
    reached = "reached" if result.reached else "not reached"
    console.print(f"the goal for this device is at most {result.goal:.2g} times the three modules: {reached}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` after the schema number. JSON has no infinity or NaN: they become "inf" and "nan"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(_finite_or_word({"schema": SCHEMA, **content}), indent=1, allow_nan=False)
    path.write_text(written + "\n")


def _finite_or_word(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_word(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_word(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
