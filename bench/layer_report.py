"""The layers job in tables, what the suites come to before the rows, and in a summary."""

from collections import Counter

from bench.layer_result import BASELINE, Comparison, LayerResult
from bench.report import clipped
from bench.summary import LAUNCHES, Group, LayersResult
from bench.terminal import Console, make_table

MOST_ROWS = 40
MOST_NAMES = 12
ABOVE_THE_ROOF = (
    "roofline above 100%: data stayed in a cache, or other work ran as the ceilings were measured"
)
GROUP_WORDS = (
    "mean: geometric, each distinct layer once; network: summed time of all uses; a/b/c: layers that are "
    "faster, even, slower; then how many are measured, and their part of the suite's roofline time"
)
IN_CACHE = "*: too small to outrun the cache, so every route finds its tensors there"
COLORS = {"slower": "red", "even": "default", "faster": "green"}


def print_layers(console: Console, result: LayersResult) -> None:
    """All suites, and the slowest rows."""
    for launch in result.launches:
        console.print(f"[bold]best rival / fused, {LAUNCHES[launch]}, by suite")
        console.print(GROUP_WORDS)
        for group in result.groups():
            if group.launch == launch:
                console.print(f"  {_group_line(group)}", highlight=False, soft_wrap=True)
    for launch in result.launches:
        _print_rows(console, result, launch)
    if any(
        one.comparisons[launch].roofline_share > 1
        for launch in result.launches
        for one in result.ordered(launch)
    ):
        console.print(ABOVE_THE_ROOF)
    _print_gaps(console, result)


def layers_summary(result: LayersResult) -> list[str]:
    """Ceilings, then means and losses by the first way of launching, then the counts of the others."""
    lines = [
        f"layers: {len(result.results)} measured, {len(result.left_out)} left out for want of time, "
        f"{len(result.too_large)} too large; first calls: {_first_calls(result)}"
    ]
    lines += [
        f"ceilings, {precision}: copy {one.bytes_per_second / 1e9:.1f} GB/s (read + written), "
        f"matrix product {one.flops_per_second / 1e12:.3g} TFLOP/s ({one.matrix_precision})"
        for precision, one in result.ceilings.items()
    ]
    for launch in result.launches[:1]:
        lines.append(f"best rival / fused, {LAUNCHES[launch]}:")
        lines += clipped([_group_line(group) for group in result.groups() if group.launch == launch])
        losses = [one for one in result.ordered(launch) if one.comparisons[launch].verdict == "slower"]
        lines.append(f"slower than the best rival, {LAUNCHES[launch]}: {len(losses) or 'none'}")
        lines += clipped([_loss_line(one, one.comparisons[launch]) for one in losses])
    for launch in result.launches[1:]:
        counted = (f"{len(names)} {kind}" for kind, names in result.by_verdict(launch).items())
        lines.append(f"{LAUNCHES[launch]}: {', '.join(counted)}")
    return lines


def _first_calls(result: LayersResult) -> str:
    """Seconds by route, which a budget cannot spend on measuring."""
    seconds: Counter[str] = Counter()
    for one in result.results:
        for entry in one.entries:
            seconds[entry.route] += entry.first_call_seconds or 0.0
    return ", ".join(f"{route} {spent:.3g} s" for route, spent in seconds.most_common() if spent) or "none"


def _group_line(group: Group) -> str:
    return (
        f"{group.suite} {group.precision} n{group.batch}: mean {group.geometric_mean:.2f} "
        f"({group.geometric_mean_to_baseline:.2f} to {BASELINE}), network {group.speedup_of_sum:.2f}, "
        f"roofline {group.floor_share:.0%}, {group.faster}/{group.even}/{group.slower}, {group.measured} "
        f"of {group.planned} layers, {group.floor_covered:.0%}, worst {group.worst_speedup:.2f} {group.worst}"
    )


def _loss_line(one: LayerResult, comparison: Comparison) -> str:
    fused, rival = (
        f"{seconds.median * 1e6:.1f} us" for seconds in (comparison.fused_seconds, comparison.rival_seconds)
    )
    plan = "" if one.plan is None else f" by {one.plan.text}"
    rival += f" by {comparison.rival}"
    notes = ", ".join([*one.row.uses, *([] if one.rotation.outruns_cache else ["stays in the cache"])])
    return f"{one.name}: {comparison.speedup.median:.2f}, {fused}{plan}, {rival} ({notes})"


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
    said = [] if len(shown) == total else [f"the first {len(shown)} of {total}, all are in the file"]
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
            more = f", and {len(names) - MOST_NAMES} more, in the file" if len(names) > MOST_NAMES else ""
            shown = ", ".join(names[:MOST_NAMES])
            console.print(f"{reason}: {len(names)} rows: {shown}{more}", highlight=False)
    recorded = [f"{suite} ({source})" for suite, source in result.suites.items() if "not installed" in source]
    if recorded:
        console.print(f"suites from a record: {', '.join(recorded)}", highlight=False)
