"""Times every plan worth timing for every convolution of some networks, and keeps all times.

``python -m tests.gpu.times RESULT SECONDS resnet50:32 ...``: networks of torchvision in float16, each with
its batch.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

import fused_cna
from fused_cna._device_timer import DeviceTimer
from fused_cna._recording import RecordedCall
from tests.gpu.evidence import write_json


class Rows:
    """A timer for `fused_cna.tune` that keeps what it measures, and measures nothing beyond its time."""

    def __init__(self, result: Path, end: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.networks: list[dict[str, Any]] = []
        self.network = ""
        self._result = result
        self._end = end
        self._timer = DeviceTimer()

    def __call__(self, call: RecordedCall, names: Sequence[str]) -> Sequence[float | Exception]:
        begin = time.monotonic()
        if begin > self._end:
            return [math.inf] * len(names)
        taken = self._timer(call, names)
        us = {n: round(t * 1e6, 3) for n, t in zip(names, taken, strict=True) if isinstance(t, float)}
        self.rows.append(
            {
                "network": self.network,
                "layer": str(call),
                "names": call.names,
                "uses": call.uses,
                "chosen": names[0],
                "problem": dict(call.problem),
                "us": us,
                "left_out": {
                    n: str(e) for n, e in zip(names, taken, strict=True) if isinstance(e, Exception)
                },
                "seconds": round(time.monotonic() - begin, 2),
            }
        )
        self.write()
        return taken

    def write(self) -> None:
        """After every convolution: what hangs in the next one takes the process with it."""
        write_json(self._result, {"networks": self.networks, "rows": self.rows})


def tune(network: str, image: int, limit: int, rows: Rows) -> None:
    """Times a network's convolutions, and notes the time of all in one run: as planned, and at best."""
    name, _, batch = network.partition(":")
    model = torchvision.models.get_model(name, weights=None).eval().cuda().half()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(int(batch), 3, image, image).half().cuda().to(memory_format=torch.channels_last)
    rows.network = network
    fused = fused_cna.fuse(model)
    result = fused_cna.tune(fused, x, timer=rows, limit=limit, progress=False, save=False)
    timed = [layer for layer in result.layers if layer.seconds_after < math.inf]
    print(f"{network}\n{result}", flush=True)
    rows.networks.append(
        {
            "network": network,
            "layers": len(result.layers),
            "timed": len(timed),
            "before_us": round(result.seconds_before * 1e6, 1),
            "after_us": round(result.seconds_after * 1e6, 1),
        }
    )
    rows.write()


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("result", type=Path)
    made.add_argument("seconds", type=float)
    made.add_argument("networks", nargs="+", metavar="NETWORK:BATCH")
    made.add_argument("--image", type=int, default=224, help="pixels each way")
    made.add_argument("--limit", type=int, default=24, help="plans of a convolution at most")
    options = made.parse_args()
    torch.backends.cudnn.benchmark = True  # so that cuDNN's route is the fastest that it has
    rows = Rows(options.result, time.monotonic() + options.seconds)
    for network in options.networks:
        tune(network, options.image, options.limit, rows)
    wrong = any("computed a wrong result" in why for row in rows.rows for why in row["left_out"].values())
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
