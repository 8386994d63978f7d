"""What a network costs before it serves: import, first call, and the first call with a new image size.

Each measurement is a fresh process of this Python (bench/first_call_process.py), with caches of compiled code
that are empty. A CPU has no kernel to plan and to launch: there the fused route is what tracing costs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.model_cases import MODELS
from bench.provenance import ROOT
from bench.setting import Setting
from bench.stats import Summary, summarize
from bench.terminal import Console, make_table

NETWORKS = ("resnet50", "mobilenet_v2")
STEPS = ("import", "prepare", "first call", "second call", "new size", "new size again")
LARGER = 32
LIMIT_SECONDS = 1200
# torch.compile is slow, and its first call hardly varies.
PROCESSES = {"eager": 3, "fused": 3, "compiled": 1}
MEANINGS = {
    "eager": "channels_last; on a GPU with torch.backends.cudnn.benchmark",
    "fused": "fused_cna.fuse",
    "compiled": "torch.compile with its defaults",
}

Start = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """Seconds of each step of a route for a network, over processes; or why there are none."""

    network: str
    route: str
    batch: int
    sizes: tuple[int, int]
    seconds: Mapping[str, Summary] = field(default_factory=dict)
    recompiled: bool = False
    failure: str = ""

    def as_json(self) -> dict[str, Any]:
        made = {name: getattr(self, name) for name in ("network", "route", "batch", "sizes")}
        if self.failure:
            return {**made, "failure": self.failure}
        seconds = {name: summary.as_json() for name, summary in self.seconds.items()}
        return {**made, "seconds": seconds, "recompiled": self.recompiled}


def cases(setting: Setting) -> list[tuple[str, str]]:
    """Networks and routes; the routes that need no compiler first."""
    routes = [route for route in PROCESSES if setting.compiled or route != "compiled"]
    return [(network, route) for route in routes for network in setting.networks or NETWORKS]


def start_process(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process answers; RuntimeError with its last line where it fails."""
    with tempfile.TemporaryDirectory() as caches:
        command = [sys.executable, "-m", "bench.first_call_process", json.dumps(request)]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": caches,
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"it took more than {LIMIT_SECONDS} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def most_steps(setting: Setting) -> int:
    """How many processes are started without a budget."""
    return sum(PROCESSES[route] for _, route in cases(setting))


def run(setting: Setting, step: Callable[[str], None], start: Start = start_process) -> list[Measured]:
    """One process of each case, then the second ones, as far as the budget allows.

    So a machine that gets busy slows all routes alike.
    """
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failures: dict[tuple[str, str], str] = {}
    for turn in range(max(PROCESSES.values())):
        for case in cases(setting):
            if turn >= PROCESSES[case[1]] or case in failures:
                continue
            if not setting.budget.allows():
                break
            step(", ".join(case))
            try:
                answers.setdefault(case, []).append(start(_request(setting, *case)))
            except RuntimeError as error:
                failures[case] = str(error)
    return [_measured(_request(setting, *case), answers[case], failures.get(case, "")) for case in answers]


def _request(setting: Setting, network: str, route: str) -> dict[str, Any]:
    size = MODELS[network].size(setting.device)
    return {
        "network": network,
        "route": route,
        "device": str(setting.device),
        "precision": setting.precision.name,
        "batch": setting.batch_or(on_cpu=1, on_gpu=8),
        "sizes": (size, size + LARGER),
        "seed": setting.seed,
    }


def _measured(request: dict[str, Any], answers: Sequence[dict[str, Any]], failure: str) -> Measured:
    case = {name: request[name] for name in ("network", "route", "batch", "sizes")}
    if failure:
        return Measured(**case, failure=failure)
    seconds = {name: summarize([answer["seconds"][name] for answer in answers]) for name in STEPS}
    return Measured(**case, seconds=seconds, recompiled=any(answer["recompiled"] for answer in answers))


def print_results(console: Console, results: Sequence[Measured]) -> None:
    """A row for each route of each network."""
    caption = "*: torch.compile compiled again. " + "; ".join(
        f"{name}: {text}" for name, text in MEANINGS.items()
    )
    table = make_table("what a network costs before it serves, in fresh processes", caption)
    for name in ("network", "route"):
        table.add_column(name)
    for name in STEPS:
        table.add_column(name, justify="right")
    for one in sorted(results, key=lambda one: list(MODELS).index(one.network)):
        table.add_row(f"{one.network} n{one.batch}", one.route, *_cells(one))
    console.print(table)


def _cells(one: Measured) -> list[str]:
    if one.failure:
        return ["failed", *[""] * (len(STEPS) - 1)]
    mark = {"new size": " *"} if one.recompiled else {}
    return [_text(one.seconds[name]) + mark.get(name, "") for name in STEPS]


def _text(summary: Summary) -> str:
    return f"{summary.median:.1f} s" if summary.median >= 1 else f"{summary.median * 1e3:.3g} ms"


def summary_of(results: Sequence[Measured]) -> list[str]:
    """A line for each network: the first calls of its routes."""
    lines = []
    for network in dict.fromkeys(one.network for one in results):
        said = [
            f"{one.route} {_text(one.seconds['first call'])} and {_text(one.seconds['new size'])}"
            for one in results
            if one.network == network and one.seconds
        ]
        lines.append(f"first call of {network}, and of a new size: {'; '.join(said)}")
    return lines
