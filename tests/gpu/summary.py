"""What a call has to say, in 6 kB: what failed, and what was measured beside what was predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from tests.gpu.predictions import LAYERS, NETWORKS

MOST_BYTES = 6000
MOST_LINES = {"times": 22}
"""Of a step; 12 of those that are not named."""

WIDTH = 220

Result = dict[str, Any]


def summarise(call: str, steps: dict[str, dict[str, Any]]) -> str:
    """The whole summary; the later lines of a long step are left out first."""
    lines = [f"SUMMARY of {call}"]
    for name, step in steps.items():
        lines.append(f"{name}: {_state(step)}")
        about, most = _about(name, step), MOST_LINES.get(name, 12)
        if len(about) > most:
            about[most:] = [f"... and {len(about) - most} lines more, in the JSON"]
        lines += [f"  {line[:WIDTH]}" for line in (*about, *step.get("tail", ()))]
    return "\n".join(lines).encode()[:MOST_BYTES].decode(errors="ignore")


def _about(name: str, step: dict[str, Any]) -> list[str]:
    if not step.get("result"):
        return []
    try:
        return list(SECTIONS[name](step["result"]))
    except Exception as error:  # what one step left behind may be odd; the others must still be told of
        return [f"its result cannot be summed up: {error!r}"]


def _state(step: dict[str, Any]) -> str:
    if "skipped" in step:
        return f"NOT RUN, {step['skipped']}"
    well = "ok" if step["status"] == 0 else f"FAILED with status {step['status']}"
    return f"{well} in {step['seconds']} s" + ", STOPPED at its limit" * step["stopped"]


def about_extension(said: Result) -> Iterator[str]:
    if "gpu" in said:
        yield ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said["gpu"].items())
    origin = "built here" if said["built_here"] else "came along"
    yield f"torch {said['torch_running']}, extension {origin}: {', '.join(said['architectures'])}"
    if said["obstacle"]:
        yield said["obstacle"]


def about_plans(said: Result) -> Iterator[str]:
    run, right = (sum(row[key] for row in said["counts"].values()) for key in ("run", "right"))
    yield f"{right} of {run} plans right, {len(said['not_run'])} not run {said['not_done']}"
    for name, row in said["counts"].items():
        if row["right"] < row["run"]:
            case, why = next((c, w) for c, w in said["wrong"].items() if _is_of(c, name))
            yield f"{name}: {row['run'] - row['right']} of {row['run']} wrong, first: {why} [{case}]"


def _is_of(case: str, kernel_and_dtype: str) -> bool:
    kernel, dtype = kernel_and_dtype.split()
    return case.startswith(f"{kernel} ") and f" {dtype} " in case


def about_tests(said: Result) -> Iterator[str]:
    yield f"{said['passed']} passed, {len(said['failed'])} failed in {said['seconds']} s"
    functions = Counter(test.partition("[")[0] for test in said["failed"])
    for function, count in functions.most_common():
        test, why = next((t, w) for t, w in said["failed"].items() if t.partition("[")[0] == function)
        yield f"{count} x {test}: {why}"


def about_probes(said: Result) -> Iterator[str]:
    for name, answer in said.items():
        yield f"{name}: {answer['text']}"


def about_networks(said: Result) -> Iterator[str]:
    rows = said["rows"]
    wrong = {name: row["wrong"] for name, row in rows.items() if row["wrong"]}
    yield f"{len(rows) - len(wrong)} of {len(rows)} right, {len(said['not_run'])} not run"
    errors = [error for row in rows.values() for error in row["errors"]]
    ratios = [error["fused"] / error["eager"] for error in errors if error["eager"]]
    if ratios:
        yield f"error over eager's: {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"
    yield from (f"{name}: {'; '.join(why)}" for name, why in wrong.items())


def about_times(said: Result) -> Iterator[str]:
    rows = said["rows"]
    for one in said["networks"]:
        predicted = NETWORKS.get(one["network"])
        beside = (
            f"; predicted without the stem {predicted[0]} now, {predicted[1]} mended" if predicted else ""
        )
        yield (
            f"{one['network']}: {one['before_us']} us as planned, {one['after_us']} us by the fastest, "
            f"{one['timed']} of {one['layers']} convolutions{beside}"
        )
    yield from _beside_predictions(rows)
    wrong = [why for row in rows for why in row["left_out"].values() if "computed a wrong result" in why]
    if wrong:
        yield f"WRONG RESULTS: {len(wrong)}, first {wrong[0]}"
    yield from _losses(rows)


def _beside_predictions(rows: list[Result]) -> Iterator[str]:
    form = "{:<29} {:>7} {:>7} {:>7} | {:>8} {:>8} {:>8}  {}"
    yield form.format("us", "now", "mended", "cuDNN", "planned", "best", "cudnn", "(predicted | measured)")
    for one in LAYERS:
        found = (row for row in rows if one.problem.items() <= row["problem"].items())
        if row := next(found, None):
            plan, best = _best(row)
            planned, cudnn = (str(row["us"].get(name, "-")) for name in (row["chosen"], "cudnn"))
            yield form.format(one.what, one.now, one.mended, one.cudnn, planned, str(best), cudnn, plan)


def _best(row: Result) -> tuple[str, float | None]:
    ours = {plan: us for plan, us in row["us"].items() if plan != "cudnn"}
    plan = min(ours, key=lambda name: ours[name], default="none")
    return plan, ours.get(plan)


def _losses(rows: list[Result]) -> Iterator[str]:
    """Where most time is lost to cuDNN's plan, by one run of the network."""
    compared = []
    for row in rows:
        plan, mine = _best(row)
        theirs = row["us"].get("cudnn")
        if mine is not None and theirs is not None:
            compared.append((row["uses"] * (mine - theirs), mine, theirs, plan, row))
    compared.sort(key=lambda one: -one[0])
    faster = sum(one[0] < 0 for one in compared)
    yield f"{faster} of {len(compared)} faster than the plan cudnn; most is lost in:"
    for lost, mine, theirs, plan, row in compared[:8]:
        yield f"{lost:.1f} us: {row['uses']} x {row['layer'][:60]}: {mine} by {plan[:44]}, cudnn {theirs}"


SECTIONS: dict[str, Callable[[Result], Iterator[str]]] = {
    "extension": about_extension,
    "plans": about_plans,
    "tests": about_tests,
    "probes": about_probes,
    "networks": about_networks,
    "times": about_times,
}
