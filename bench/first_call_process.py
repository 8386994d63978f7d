"""One fresh process of the job first-call: times what a network costs before it serves, prints it as JSON.

Nothing but the standard library is imported before the clock of the imports runs.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds of named steps, in their order; a GPU is waited for after each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.wait: Callable[[], object] = lambda: None

    def time(self, name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        self.wait()
        self.seconds[name] = time.perf_counter() - start
        return result


def import_packages(route: str) -> None:
    import torch  # noqa: F401

    if route == "fused":
        import fused_cna  # noqa: F401


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The seconds of each step, and whether the compiler ran again for the new size."""
    clock, route = Clock(), request["route"]
    clock.time("import", lambda: import_packages(route))

    import torch

    from bench.model_cases import MODELS
    from bench.setting import PRECISIONS

    torch.backends.cudnn.benchmark = True
    precision, device = PRECISIONS[request["precision"]], torch.device(request["device"])
    model = MODELS[request["network"]]
    torch.manual_seed(request["seed"])
    network = model.answers(model.build()).eval().to(device, precision.dtype)
    network = network.to(memory_format=torch.channels_last)
    images = [
        torch.randn(request["batch"], 3, size, size, device=device, dtype=precision.dtype).to(
            memory_format=torch.channels_last
        )
        for size in request["sizes"]
    ]
    if device.type == "cuda":
        clock.wait = torch.cuda.synchronize
        clock.wait()
    with precision.applied(), torch.inference_mode():
        prepared = clock.time("prepare", lambda: prepare(network, route))
        clock.time("first call", lambda: prepared(images[0]))
        clock.time("second call", lambda: prepared(images[0]))
        before = compiled_graphs()
        clock.time("new size", lambda: prepared(images[1]))
        recompiled = compiled_graphs() > before
        clock.time("new size again", lambda: prepared(images[1]))
    return {"seconds": clock.seconds, "recompiled": recompiled}


def prepare(network: Any, route: str) -> Any:
    """The network as it is called. Tracing and compiling wait for the first call."""
    if route == "fused":
        import fused_cna

        return fused_cna.fuse(network)
    if route == "compiled":
        import torch

        return torch.compile(network)
    return network


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
