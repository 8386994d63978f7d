"""Results in tables, and a summary of them that stays short: of a long log only the end may be seen."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.overhead import MEANINGS
from bench.result import LAUNCHES, Entry, Outcome, Record, Summary, fastest
from bench.routes import EAGER, FUSED

WIDTH_IN_FILES = 200
MOST_ROWS, MOST_LINES, WIDEST_LINE = 40, 8, 150
COLORS = {"slower": "red", "even": "default", "faster": "green"}
GROUP_WORDS = (
    "mean: geometric, each distinct layer once; network: summed time of all uses; a/b/c: layers that are "
    "faster, even, slower; then how many are measured, and their part of the suite's roofline time"
)
GROUP = (
    "  {suite} {precision} n{batch}: mean {geometric_mean:.2f} ({geometric_mean_to_eager:.2f} to eager), "
    "network {speedup_of_sum:.2f}, roofline {floor_share:.0%}, {faster}/{even}/{slower}, {measured} of "
    "{planned} layers, {floor_covered:.0%}, worst {worst_speedup:.2f} {worst}"
)
LAYERS_CAPTION = (
    "*: too small to outrun the cache, so every route finds its tensors there; a roofline above 100%: so it "
    "is, or other work ran as the ceilings were measured"
)


def make_console() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    made = Console()
    return made if made.is_terminal else Console(width=WIDTH_IN_FILES)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
) -> None:
    """Columns are to the right, but the first and those whose name begins with '<'."""
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        left = index == 0 or column.startswith("<")
        table.add_column(column.lstrip("<"), justify="left" if left else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def say(console: Console, lines: Iterable[str], style: str | None = None) -> None:
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def ratio_text(ratio: Summary | None) -> str:
    if ratio is None:
        return "-"
    return f"[{COLORS[ratio.verdict]}]{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})[/]"


def time_text(seconds: float) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def clipped(lines: Sequence[str], most: int = MOST_LINES) -> list[str]:
    """The first of them, cut to a width, and how many more there are."""
    shown = [textwrap.shorten(line, WIDEST_LINE, placeholder=" ...") for line in lines[:most]]
    more = [f"and {len(lines) - most} more, in the file"] if len(lines) > most else []
    return [f"  {line}" for line in (*shown, *more)]


def print_networks(console: Console, outcome: Outcome) -> None:
    """How many times faster than eager, then the same answers and what it takes to prepare."""
    tried = dict.fromkeys(e.route for one in outcome.records for e in one.routes if e.error is not None)
    for launch in outcome.launches:
        rows = []
        for one in outcome.records:
            eager = fastest((entry for entry in one.routes if entry.eager), launch)
            before = f"{time_text(eager.seconds[launch].median)} {eager.route[6:]}" if eager else "-"
            found = {entry.route: entry.speedups.get(launch) for entry in one.routes}
            rows.append((one.name, before, *(ratio_text(found.get(n)) for n in tried if n not in EAGER)))
        columns = ("network", "eager", *(name for name in tried if name not in EAGER))
        caption = "above 1 the route is faster; eager: the faster of both layouts, and its time"
        title = f"networks, {LAUNCHES[launch]}: time of eager / time of the route (quartiles)"
        print_table(console, title, columns, rows, caption)
    answers = []
    for one in outcome.records:
        cells = {entry.route: _answer(entry) for entry in one.routes if entry.error is not None}
        answers.append((one.name, *(cells.get(name, "-") for name in tried)))
    if answers:
        title = "networks: the same answers? (largest relative error of an image to float64, top-1 agreement)"
        caption = (
            "then seconds to fuse or compile, and calls of convolutions that are fused; weights are random"
        )
        print_table(console, title, ("network", *tried), answers, caption)
    notes = [(f"left out: {why}", name) for name, why in outcome.left_out.items()]
    for one in outcome.records:
        for e in one.routes:
            said = [
                ("not timed: ", e.refused),
                ("not in a CUDA graph: ", e.no_graph),
                *(("", n) for n in e.notes),
            ]
            notes += [(what + why, f"{one.name} {e.route}") for what, why in said if why]
    for note in dict.fromkeys(note for note, _ in notes):
        say(console, [f"{note} ({', '.join(name for why, name in notes if why == note)})"])
    say(console, dict.fromkeys(f"images: {one.facts['images']}" for one in outcome.records))


def _answer(entry: Entry) -> str:
    text = f"{entry.error:.1e} {entry.agreement:.1%}"
    setup = "" if entry.eager else f", {entry.setup_seconds:.2g} s"
    fused = f", {entry.fused_calls} of {entry.conv_calls}" if entry.conv_calls else ""
    return f"{text}{setup}{fused}" if entry.refused is None else f"[red]{text}[/]"


def networks_summary(outcome: Outcome) -> list[str]:
    """The ratios of each network by its best way of launching."""
    lines = []
    for one in outcome.records:
        for launch in [launch for launch in LAUNCHES if launch in one.comparisons][:1]:
            timed = [entry for entry in one.routes if not entry.eager and launch in entry.speedups]
            said = ", ".join(f"{entry.route} {entry.speedups[launch].median:.2f}" for entry in timed)
            lines.append(f"{one.name}, {LAUNCHES[launch]}, eager / route: {said}")
    return [_counts("networks", outcome), *clipped(lines, 10)]


def _counts(what: str, outcome: Outcome) -> str:
    before = f" ({outcome.resumed} in the run that this one resumes)" if outcome.resumed else ""
    return f"{what}: {len(outcome.records)} measured{before}, {len(outcome.left_out)} left out"


def print_layers(console: Console, outcome: Outcome) -> None:
    """All suites, the slowest rows, and what is not in the numbers."""
    for launch in outcome.launches:
        groups = [GROUP.format(**group) for group in outcome.groups() if group["launch"] == launch]
        say(console, [f"fastest rival / fused, {LAUNCHES[launch]}, by suite", GROUP_WORDS, *groups])
        ordered = outcome.ordered(launch)
        title = f"layers, {LAUNCHES[launch]}, the {min(len(ordered), MOST_ROWS)} slowest of {len(ordered)}"
        planned = {one.facts["plan"]["device"] for one in ordered if one.facts["plan"]}
        caption = (
            f"plan us: the planner's model for {', '.join(sorted(planned))}, not measured; {LAYERS_CAPTION}"
        )
        columns = ("layer", "fused us", "plan us", "rival us", "rival / fused", "roofline", "<rival", "<plan")
        print_table(console, title, columns, [_layer(one, launch) for one in ordered[:MOST_ROWS]], caption)
    reasons = Counter(
        f"{entry.route}: {entry.refused or entry.no_graph}"
        for one in outcome.records
        for entry in one.routes
        if entry.refused or entry.no_graph
    )
    say(console, [f"not compared, {count} times: {reason}" for reason, count in reasons.most_common(12)])
    for why in dict.fromkeys(outcome.left_out.values()):
        names = [name for name, reason in outcome.left_out.items() if reason == why]
        say(console, [f"left out, {why}: {len(names)} layers: {', '.join(names[:12])}"])


def _layer(one: Record, launch: str) -> tuple[str, ...]:
    found, facts = one.comparisons[launch], one.facts
    times = [f"{seconds.median * 1e6:.1f}" for seconds in (found.seconds, found.rival_seconds)]
    in_cache = "" if facts["rotation"]["outruns_cache"] else " *"
    roofline = f"{found.roofline_share:.0%} {facts['floor']['bound']}{in_cache}"
    estimate = f"{facts['plan']['estimate_us']:.1f}" if facts["plan"] else "-"
    plan = _plan(one) or str(facts["why_no_plan"])
    return one.name, times[0], estimate, times[1], ratio_text(found.speedup), roofline, found.rival, plan


def _plan(one: Record) -> str:
    plan = one.facts["plan"] or {"kernel": "", "tile": (), "split_k": 1}
    tile = "x".join(map(str, plan["tile"])) if any(plan["tile"]) else ""
    split = f"split {plan['split_k']}" if plan["split_k"] > 1 else ""
    return " ".join(word for word in (plan["kernel"], tile, split) if word)


def layers_summary(outcome: Outcome) -> list[str]:
    """Ceilings, then means and losses by the first way of launching, then the counts of the others."""
    spent: dict[str, float] = {}
    for entry in (entry for one in outcome.records for entry in one.routes):
        took = (entry.setup_seconds or 0.0) + (entry.first_call_seconds or 0.0)
        spent[entry.route] = spent.get(entry.route, 0.0) + took
    first = ", ".join(f"{route} {seconds:.3g} s" for route, seconds in spent.items() if seconds)
    lines = [f"{_counts('layers', outcome)}; to prepare: {first}"]
    lines += [
        f"ceilings, {name}: copy {one['bytes_per_second'] / 1e9:.1f} GB/s (read + written), "
        f"matrix product {one['flops_per_second'] / 1e12:.3g} TFLOP/s ({one['matrix_precision']})"
        for name, one in outcome.ceilings.items()
    ]
    for index, launch in enumerate(outcome.launches):
        losses = [f"{one.name}: {_loss(one, launch)}" for one in outcome.slower(launch)]
        groups = [GROUP.format(**group) for group in outcome.groups() if group["launch"] == launch]
        lines += [f"fastest rival / fused, {LAUNCHES[launch]}:", *clipped(groups)] if index == 0 else []
        lines.append(f"slower than the fastest rival, {LAUNCHES[launch]}: {len(losses) or 'none'}")
        lines += clipped(losses) if index == 0 else []
    return lines


def _loss(one: Record, launch: str) -> str:
    found = one.comparisons[launch]
    ours, rival = (f"{seconds.median * 1e6:.1f} us" for seconds in (found.seconds, found.rival_seconds))
    ours += f" by {_plan(one)}, {rival} by {found.rival}"
    return f"{found.speedup.median:.2f}, {ours} ({', '.join(one.uses)})"


def print_overhead(console: Console, outcome: Outcome) -> None:
    """A row for each part of a call, a column for each mode, in microseconds."""
    parts = outcome.extra.get("parts", {})
    say(console, [parts["why_not"]] if "why_not" in parts else [])
    modes: dict[str, dict[str, Any]] = parts.get("seconds", {})
    names = [name for name in MEANINGS if any(name in seconds for seconds in modes.values())]
    rows = [
        (name, *(_microseconds(seconds[name]) for seconds in modes.values()), MEANINGS[name])
        for name in names
    ]
    caption = "" if "launch" in names else "without the launch itself, which needs a GPU"
    if rows:
        title = "host time of a fused call by parts, us: median (quartiles)"
        print_table(console, title, ("part", *modes, "<what it is"), rows, caption)


def _microseconds(found: Mapping[str, float]) -> str:
    return "{median:.2f} ({low:.2f}-{high:.2f})".format(
        **{name: value * 1e6 for name, value in found.items()}
    )


def overhead_summary(outcome: Outcome) -> list[str]:
    """Host time per call of each route, and what part of it a fused one takes."""
    timed = [entry for one in outcome.records for entry in one.routes if entry.seconds]
    ours = [entry for entry in timed if entry.route == FUSED]
    lines = []
    for entry in timed if ours else []:
        ratio = entry.speedup_over(ours[0], "launched")
        took = time_text(entry.seconds["launched"].median)
        lines.append(f"host time of a call, {entry.route}: {took}; fused takes {ratio.median:.2f} of it")
    return lines


def print_first_calls(console: Console, outcome: Outcome) -> None:
    """A row for each route of each network."""
    title = "what a network costs before it serves, in fresh processes"
    rows = sorted(_first_calls(outcome), key=lambda row: row[0])
    columns = ("network", "<route", *(outcome.extra.get("steps") or ()))
    print_table(console, title, columns, rows, "*: torch.compile compiled again")


def first_calls_summary(outcome: Outcome) -> list[str]:
    return [f"{network}, {route}: {', '.join(took)}" for network, route, *took in _first_calls(outcome)]


def _first_calls(outcome: Outcome) -> list[list[str]]:
    rows = []
    for row in outcome.extra.get("results", ()):
        took = [time_text(one["median"]) for one in row.get("seconds", {}).values()] or [row["failure"]]
        if row.get("recompiled"):
            took[4] += " *"
        rows.append([f"{row['network']} n{row['batch']}", row["route"], *took])
    return rows


def print_summary(console: Console, lines: Sequence[str], failures: Sequence[str]) -> None:
    say(console, ["summary", *lines])
    style = "red" if failures else None
    say(console, [f"wrong or not run: {len(failures) or 'none'}", *clipped(failures)], style)
