"""What measured times say of the plan: ``python -m tests.gpu.fit CALL.json ... [--ship FILE]``.

Of every network that a call timed: what the plans that are chosen now cost over the fastest, by the times in
the files. Of every kernel: measured over estimated time. ``--ship`` writes the fastest plans as a file of
tuned plans; those under fused_cna/plans/ come with the package.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fused_cna import _tuned, plan_file
from fused_cna._tuned import Target
from fused_cna.plan import planner

Row = dict[str, Any]


def read_rows(path: Path) -> tuple[plan_file.Device, list[Row]]:
    """The GPU of a call, and what it timed: one convolution of a network each."""
    steps = json.loads(path.read_text())["steps"]
    gpu = steps["extension"]["result"]["gpu"]
    device = plan_file.Device(gpu["name"], gpu["capability"], gpu["multiprocessors"])
    return device, steps.get("times", {}).get("result", {}).get("rows", [])


def estimates(target: Target, row: Row) -> dict[str, float]:
    """The legal plans by name with their estimates in microseconds, the one that would run first."""
    listed = planner().candidates(row["problem"], dict(target.info))
    return {one["name"]: one["estimate_us"] for one in listed if not one["illegal"]}


def regrets(target: Target, rows: Iterable[Row]) -> Iterator[str]:
    """By network: the time of the plans with the least estimates and of the fastest, of all measured."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for row in rows:
        legal = estimates(target, row)
        measured = [row["us"][name] for name in legal if name in row["us"]]
        if measured:
            planned = next(iter(legal)) in row["us"]
            more = row["uses"] * measured[0], row["uses"] * min(measured), planned, 1
            sums[row["network"]] = [
                one + other for one, other in zip(sums[row["network"]], more, strict=True)
            ]
    for network, (chosen, best, planned, count) in sums.items():
        yield (
            f"{network}: {chosen:.1f} us as chosen, {best:.1f} us at best, regret {chosen / best - 1:.1%}; "
            f"of {count:.0f} convolutions the plan of {count - planned:.0f} was not measured"
        )


def ratios(target: Target, rows: Iterable[Row]) -> Iterator[str]:
    """By kernel: the geometric mean of measured over estimated time, and how far plans scatter about it."""
    logs: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        legal = estimates(target, row)
        for name in row["us"].keys() & legal.keys():
            logs[name.partition(" ")[0]].append(math.log(row["us"][name] / legal[name]))
    for kernel, its in sorted(logs.items()):
        mean, spread = math.exp(fmean(its)), math.expm1(pstdev(its))
        yield f"{kernel}: measured over estimated {mean:.2f}, spread {spread:.0%}, {len(its)} plans"


def winners(target: Target, rows: Iterable[Row]) -> Iterator[plan_file.TunedPlan]:
    """The fastest plan of every problem whose plan is another and was measured."""
    for row in rows:
        legal = estimates(target, row)
        times = {name: us for name, us in row["us"].items() if name in legal or name == "cudnn"}
        planned = next(iter(legal))
        best = min(times, key=times.__getitem__, default=planned)
        if planned in times and best != planned:
            yield plan_file.TunedPlan(plan_file.problem_key(row["problem"]), best, times[best])


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("calls", nargs="+", type=Path, metavar="CALL.json")
    made.add_argument("--ship", type=Path, metavar="FILE", help="add the fastest plans to this file")
    options = made.parse_args()
    by_device: dict[plan_file.Device, list[Row]] = defaultdict(list)
    for path in options.calls:
        device, rows = read_rows(path)
        by_device[device] += rows
    for device, rows in by_device.items():
        known = (_tuned.named_target(planner(), name) for name in planner().devices())
        target = next((one for one in known if one.device.stands_for(device)), None)
        if target is None:
            raise SystemExit(f"the planner knows no {device}; it knows {', '.join(planner().devices())}")
        print("\n".join([device.name, *regrets(target, rows), *ratios(target, rows)]))
        if options.ship:
            plans = list(winners(target, rows))
            plan_file.add(options.ship, device, plans)
            print(f"{len(plans)} plans for {device.name} added to {options.ship}")


if __name__ == "__main__":
    main()
