"""Tables of the layers job: what lost first, by name; then what the suites come to; then the rows."""

import math

from bench.layer_result import BASELINE, Comparison, LayerResult
from bench.summary import LAUNCHES, Group, LayersResult
from bench.terminal import Console, make_table

MOST_ROWS = 40
MOST_NAMES = 12
ABOVE_THE_ROOF = (
    "roofline above 100%: data stayed in a cache, or other work ran as the ceilings were measured"
)
IN_CACHE = "*: too small to outrun the cache, so every route finds its tensors there"
COLORS = {"slower": "red", "even": "default", "faster": "green"}


def print_layers(console: Console, result: LayersResult) -> None:
    """Everything about a run."""
    for launch in result.launches:
        _print_losses(console, result, launch)
    for precision, ceilings in result.ceilings.items():
        console.print(
            f"ceilings, {precision}: copy {ceilings.bytes_per_second / 1e9:.1f} GB/s (read + written), "
            f"matrix product {ceilings.flops_per_second / 1e12:.3g} TFLOP/s ({ceilings.matrix_precision})",
            highlight=False,
        )
    for launch in result.launches:
        _print_groups(console, result, launch)
    for launch in result.launches:
        _print_rows(console, result, launch)
    if any(
        one.comparisons[launch].roofline_share > 1
        for launch in result.launches
        for one in result.ordered(launch)
    ):
        console.print(ABOVE_THE_ROOF)
    _print_gaps(console, result)


def _print_losses(console: Console, result: LayersResult, launch: str) -> None:
    slower = [one for one in result.ordered(launch) if one.comparisons[launch].verdict == "slower"]
    console.print(f"[bold]slower than the best rival, {LAUNCHES[launch]}: {len(slower) or 'none'}")
    for one in slower:
        comparison = one.comparisons[launch]
        console.print(
            f"  {one.name}: {comparison.speedup.median:.2f} of {comparison.rival} "
            f"({', '.join(one.row.uses)})",
            style="red",
            highlight=False,
            soft_wrap=True,
        )


def _print_groups(console: Console, result: LayersResult, launch: str) -> None:
    table = make_table(
        f"suites, {LAUNCHES[launch]} (best rival / fused)",
        "mean: geometric, each distinct layer once; network: summed time of all uses; floor covered: the "
        "measured part of the suite's roofline time",
        dense=True,
    )
    for column in ("suite", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("batch", "layers", "floor covered", "mean", f"mean to {BASELINE}", "network", "roofline"):
        table.add_column(column, justify="right")
    table.add_column("faster/even/slower", justify="right", no_wrap=True)
    table.add_column("worst layer")
    for group in result.groups():
        if group.launch == launch:
            table.add_row(*_group_cells(group))
    console.print(table)


def _group_cells(group: Group) -> tuple[str, ...]:
    to_baseline = group.geometric_mean_to_baseline
    return (
        group.suite,
        group.precision,
        str(group.batch),
        f"{group.measured} of {group.planned}",
        f"{group.floor_covered:.0%}",
        f"{group.geometric_mean:.2f}",
        "-" if math.isnan(to_baseline) else f"{to_baseline:.2f}",
        f"{group.speedup_of_sum:.2f}",
        f"{group.floor_share:.0%}",
        f"{group.faster}/{group.even}/{group.slower}",
        f"{group.worst_speedup:.2f} {group.worst}",
    )


def _print_rows(console: Console, result: LayersResult, launch: str) -> None:
    ordered = result.ordered(launch)
    shown = ordered[:MOST_ROWS]
    table = make_table(
        f"layers, {LAUNCHES[launch]}, slowest first (ratio: best rival / fused)",
        _rows_caption(shown, len(ordered)),
        dense=True,
    )
    table.add_column("layer", no_wrap=True)
    for column in ("fused us", "plan us", "rival us", "ratio", "quartiles", "roofline"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("best rival", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    for one in shown:
        table.add_row(*_row_cells(one, one.comparisons[launch]))
    console.print(table)


def _rows_caption(shown: list[LayerResult], total: int) -> str:
    said = [] if len(shown) == total else [f"the first {len(shown)} of {total}, all are in results.json"]
    devices = sorted({one.plan.device for one in shown if one.plan is not None})
    said += [f"plans are for {', '.join(devices)}, plan us by its model, not measured"] if devices else []
    said += sorted({f"no plan: {one.why_no_plan}" for one in shown if one.why_no_plan is not None})
    said += [] if all(one.rotation.outruns_cache for one in shown) else [IN_CACHE]
    return "; ".join(said)


def _row_cells(one: LayerResult, comparison: Comparison) -> tuple[str, ...]:
    speedup, plan = comparison.speedup, one.plan
    return (
        one.name,
        f"{comparison.fused_seconds.median * 1e6:.1f}",
        "-" if plan is None else f"{plan.estimate_us:.1f}",
        f"{comparison.rival_seconds.median * 1e6:.1f}",
        f"[{COLORS[comparison.verdict]}]{speedup.median:.2f}[/]",
        f"{speedup.low:.2f}-{speedup.high:.2f}",
        f"{comparison.roofline_share:.0%} {one.floor.bound}{'' if one.rotation.outruns_cache else ' *'}",
        comparison.rival,
        "-" if plan is None else plan.text,
    )


def _print_gaps(console: Console, result: LayersResult) -> None:
    """What is not in the numbers."""
    if result.resumed:
        console.print(f"{result.resumed} rows were measured in the run that this one resumes")
    for reason, names in (
        ("left out for want of time", result.left_out),
        ("did not fit the device's memory", result.too_large),
    ):
        if names:
            more = f", and {len(names) - MOST_NAMES} more, in results.json" if len(names) > MOST_NAMES else ""
            shown = ", ".join(names[:MOST_NAMES])
            console.print(f"{reason}: {len(names)} rows: {shown}{more}", highlight=False)
    recorded = [f"{suite} ({source})" for suite, source in result.suites.items() if "not installed" in source]
    if recorded:
        console.print(f"suites from a record: {', '.join(recorded)}", highlight=False)
