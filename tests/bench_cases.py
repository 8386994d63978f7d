"""Small layers, settings and results that the tests of the bench share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.entry import Entry
from bench.layer_list import Layer, parse
from bench.layer_result import BASELINE, Comparison, LayerResult
from bench.roofline import Ceilings, Floor
from bench.rows import Row
from bench.setting import PRECISIONS, Budget, Effort, Setting
from bench.stats import Summary
from bench.timing import Rotation

CPU = torch.device("cpu")
FORMATS = (torch.contiguous_format, torch.channels_last)
CEILINGS = Ceilings(1e9, 1e12, 1, 1, "float32")
CSV_ROW = {
    "kind": "kxk dense",
    "norm": "BatchNorm2d",
    "act": "ReLU",
    "residual": "none",
    "conv_bias": "0",
    **dict.fromkeys(
        ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups", "uses", "models"), "1"
    ),
    "cin": "8",
    "cout": "4",
    "kh": "3",
    "kw": "3",
    "h": "6",
    "w": "5",
}


def layer(**changes: object) -> Layer:
    return replace(parse(CSV_ROW, "a role"), **changes)  # type: ignore[arg-type]


def row(changed: Layer | None = None, batch: int = 2, precision: str = "fp32", **uses: int) -> Row:
    return Row(changed or layer(), batch, precision, uses or {"quick": 1})


def setting(*, budget: Budget | float | None = None, device: torch.device = CPU, **changes: Any) -> Setting:
    limit = budget if isinstance(budget, Budget) else Budget(budget)
    made = Setting(device, (PRECISIONS["fp32"],), ("quick",), (2,), Effort(3, 0.0), limit, seed=0)
    return replace(made, **changes)


def two_sets(set_bytes: int, cache_bytes: int) -> Rotation:
    return Rotation(2, set_bytes, cache_bytes)


def exact(value: float) -> Summary:
    return Summary(value, value, value, 1)


class FakeClock:
    """Seconds that pass only where work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now
        work()
        return self.now - start


def entry(route: str, seconds: float, *, error: float = 1e-7, ours: bool = False) -> Entry:
    made = Entry(route, "channels_last", ours, error=error, samples={"launched": [seconds, seconds]})
    made.summarize()
    return made


def layer_result(speedup: float, measured: Row | None = None, **changes: Any) -> LayerResult:
    """A result that took 1 ms, launched both ways, and its best rival `speedup` times that."""
    kind = "faster" if speedup > 1 else "slower" if speedup < 1 else "even"
    comparison = Comparison(exact(1e-3), "folded conv", exact(speedup * 1e-3), exact(speedup), kind, 0.5)
    baseline = replace(comparison, rival=BASELINE, rival_seconds=exact(4e-3), speedup=exact(4.0))
    both, to_baseline = (dict.fromkeys(("launched", "graph"), one) for one in (comparison, baseline))
    made = LayerResult(
        row=measured or row(layer(cout=4 + round(8 * speedup))),
        floor=Floor(1e-4, "memory"),
        flops=10**6,
        least_bytes=10**5,
        rotation=Rotation(3, 1000, 1000),
        entries=[entry("fused", 1e-3, ours=True), entry(BASELINE, 4e-3)],
        comparisons=both,
        against_baseline=to_baseline,
        failure=None,
    )
    return replace(made, **changes)
