"""Ten networks, fused, against eager on the same GPU; each 100 times over, and with too little memory.

``python -m tests.gpu.networks RESULT SECONDS [NETWORK ...]``, in float16, bfloat16, and float32 by tf32 and
by IEEE products. Names are those of tests/zoo/networks.txt.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_cna
from bench.cases import PRECISIONS, Precision
from bench.measure import allowed_error
from tests.gpu.evidence import write_json
from tests.reference import relative_error
from tests.zoo.catalogue import Entry, arguments_of, entry
from tests.zoo.judge import prepare

NETWORKS = (
    "tv/resnet50",
    "tv/vgg16_bn",
    "tv/densenet121",
    "tv/resnext50_32x4d",
    "tv/regnet_y_1_6gf",
    "timm/cs3darknet_m",
    "timm/dla34",
    "tv/mobilenet_v2",
    "tv/mobilenet_v3_large",
    "tv/efficientnet_b0",
)
Network = Callable[[Tensor], Tensor]
PART = 0.8
"""Of the memory that a run needs at once: some layers run, then an allocation fails."""


def repeats(fused: Network, x: Tensor, expected: Tensor, times: int) -> list[str]:
    differ = sum(not torch.equal(fused(x), expected) for _ in range(times))
    return [f"{differ} of {times} runs differ from the first"] if differ else []


def survives(fused: Network, x: Tensor) -> list[str]:
    """A run that has too little memory raises, and the next has the same result as the one before."""
    expected = fused(x)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    fused(x)
    needed = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + PART * needed) / total)
    try:
        fused(x)
        failures = [f"{PART:.0%} of {needed >> 20} MiB were enough"]
    except torch.OutOfMemoryError:
        failures = []
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return failures + ["it differs after that"] * (not torch.equal(fused(x), expected))


def judge(
    which: Entry, network: nn.Module, fused: nn.Module, precision: Precision, times: int, copies: int
) -> dict[str, Any]:
    """Relative errors from the network in float64, of eager and fused, and what is wrong, in words."""
    sizes = [(which.size, which.size), *([which.other_size] if which.other_size else [])]
    network, fused = (copy.deepcopy(one).to("cuda", precision.dtype) for one in (network, fused))
    network, fused = (one.to(memory_format=torch.channels_last) for one in (network, fused))  # type: ignore[call-overload]
    exact, wrong, errors = copy.deepcopy(network).double(), [], []
    with precision.applied(), torch.inference_mode():
        for size in sizes:
            x = arguments_of(which, size)[0].to("cuda", precision.dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            expected, actual = exact(x.double()), fused(x)
            eager, mine = (relative_error(y, expected) for y in (network(x), actual))
            allowed = allowed_error(eager, precision, room=2)
            errors.append({"eager": eager, "fused": mine, "allowed": allowed})
            if not mine <= allowed:
                wrong.append(f"error {mine:.2g} at {size}, of eager {eager:.2g}")
            wrong += repeats(fused, x, actual, times)
        wrong += survives(fused, x.repeat(copies, 1, 1, 1))
    return {"errors": errors, "wrong": wrong}


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("result", type=Path)
    made.add_argument("seconds", type=float)
    made.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    made.add_argument("--times", type=int, default=100, help="runs whose results are to be the same")
    made.add_argument("--copies", type=int, default=128, help="of four images, where memory is to run short")
    options = made.parse_args()
    end = time.monotonic() + options.seconds
    fused_cna.config.strict = True
    rows: dict[str, dict[str, Any]] = {}
    planned = [f"{name} {precision}" for name in options.networks for precision in PRECISIONS]
    for name in options.networks:
        if time.monotonic() > end:
            break
        which = entry(name)
        network = prepare(which)
        fused = fused_cna.fuse(network)
        for precision in PRECISIONS.values():
            if time.monotonic() > end:
                break
            row = f"{name} {precision.name}"
            try:
                rows[row] = judge(which, network, fused, precision, options.times, options.copies)
            except RuntimeError as error:  # the other networks still count
                first = str(error).partition("\n")[0][:300]
                rows[row] = {"errors": [], "wrong": [f"{type(error).__name__}: {first}"]}
            print(f"{row}: {'; '.join(rows[row]['wrong']) or 'right'}", flush=True)
            write_json(options.result, {"rows": rows, "not_run": [one for one in planned if one not in rows]})
    return int(len(rows) < len(planned) or any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
