"""What a network costs before it serves: import, first call, and the first call with a new image size.

Each measurement is a fresh process of this Python, `python -m bench.first_call REQUEST`, with caches of
compiled code that are empty. A CPU has no kernel to plan and to launch: there the fused route is what
tracing costs. Nothing but the standard library is imported before the clock of the imports runs.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.measure import Run, Setting

NETWORKS = ("resnet50", "mobilenet_v2")
STEPS = ("import", "prepare", "first call", "second call", "new size", "new size again")
LARGER = 32
LIMIT_SECONDS = 1200
# torch.compile is slow, and its first call hardly varies.
PROCESSES = {"eager": 3, "fused": 3, "compiled": 1}
Start = Callable[[dict[str, Any]], dict[str, Any]]


def start_process(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process answers; RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "bench.first_call", json.dumps(request)]
    with tempfile.TemporaryDirectory() as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": f"{caches}/triton"}
        how: Any = {
            "cwd": Path(__file__).parents[1],
            "env": os.environ | environment,
            "timeout": LIMIT_SECONDS,
        }
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"it took more than {LIMIT_SECONDS} s") from error
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def cases(setting: "Setting") -> list[tuple[int, str, str]]:
    """Turns, routes and networks, in order: the routes that need no compiler first."""
    return [
        (turn, route, network)
        for turn in range(max(PROCESSES.values()))
        for route, processes in PROCESSES.items()
        for network in setting.networks or NETWORKS
        if turn < processes and (setting.compiled or route != "compiled")
    ]


def run(run: "Run", start: Start = start_process) -> None:
    """One process of each route and network, then the second ones, as far as the budget allows.

    So a machine that gets busy slows all routes alike.
    """
    from bench.networks import MODELS
    from bench.result import summarize

    setting, outcome = run.setting, run.outcome
    found: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for turn, route, network in cases(setting):
        name, size = f"{network}, {route}", MODELS[network].size
        if turn and name not in answers:
            continue
        if not setting.budget.allows():
            outcome.left_out |= {} if turn else {name: setting.budget.why_not}
            continue
        run.step(name)
        batch = (setting.batches or (8 if setting.gpu else 1,))[0]
        row = {"network": network, "route": route, "batch": batch, "sizes": [size, size + LARGER]}
        options = {
            "device": str(setting.device),
            "precision": setting.precisions[0].name,
            "seed": setting.seed,
        }
        try:
            answers.setdefault(name, []).append(start(row | options))
        except RuntimeError as error:
            found[name], _ = row | {"failure": str(error)}, answers.pop(name)
            outcome.broke_off += [f"{network}: {error}"] if route == "fused" else []
            continue
        seconds = {step: asdict(summarize([a["seconds"][step] for a in answers[name]])) for step in STEPS}
        found[name] = row | {"seconds": seconds, "recompiled": any(a["recompiled"] for a in answers[name])}
    outcome.extra |= {"steps": STEPS, "results": list(found.values())}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process: the seconds of each step, and whether the compiler ran again for the new size."""
    seconds: dict[str, float] = {}

    def clock(name: str, step: Callable[[], Any], wait: Callable[[], object] = lambda: None) -> Any:
        start = time.perf_counter()
        result = step()
        wait()
        seconds[name] = time.perf_counter() - start
        return result

    route = request["route"]
    package = "fused_cna" if route == "fused" else "torch"
    imported = clock("import", lambda: importlib.import_module(package))

    import torch

    from bench.cases import PRECISIONS
    from bench.networks import MODELS

    torch.backends.cudnn.benchmark = True
    precision, device = PRECISIONS[request["precision"]], torch.device(request["device"])
    placed: Any = {"device": device, "dtype": precision.dtype, "memory_format": torch.channels_last}
    torch.manual_seed(request["seed"])
    network = MODELS[request["network"]].build().eval().to(**placed)
    images = [torch.randn(request["batch"], 3, size, size).to(**placed) for size in request["sizes"]]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    # Tracing and compiling wait for the first call.
    prepare = {"fused": lambda: imported.fuse(network), "compiled": lambda: torch.compile(network)}
    with precision.applied(), torch.inference_mode():
        prepared = clock("prepare", prepare.get(route, lambda: network), wait)
        clock("first call", lambda: prepared(images[0]), wait)
        clock("second call", lambda: prepared(images[0]), wait)
        before = _compiled_graphs()
        clock("new size", lambda: prepared(images[1]), wait)
        recompiled = _compiled_graphs() > before
        clock("new size again", lambda: prepared(images[1]), wait)
    return {"seconds": seconds, "recompiled": recompiled}


def _compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
