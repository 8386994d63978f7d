"""What was measured on a layer, and what it comes to: the comparison with the best rival, losses first."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.checks import allowed_for_rivals, allowed_for_us
from bench.layer_list import RULE, Layer
from bench.roofline import Ceilings, Floor, share
from bench.stats import Summary, geometric_mean, paired_ratio, summarize, verdict

BASELINE = "three-step"
LAUNCHES = {"launched": "launched eagerly", "graph": "in a CUDA graph"}


@dataclass
class Entry:
    """One route in one memory format on one layer. `refused` says why it was not timed."""

    route: str
    memory_format: str
    ours: bool
    refused: str | None = None
    error: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        seconds = {launch: summarize(samples).as_json() for launch, samples in self.samples.items()}
        return {key: value for key, value in asdict(self).items() if key != "samples"} | {"seconds": seconds}


@dataclass(frozen=True)
class Comparison:
    """Fused against the best rival, launched one way. `speedup` is rival / fused: below 1, fused lost."""

    fused_seconds: Summary
    rival: str
    rival_seconds: Summary
    speedup: Summary
    verdict: str
    roofline_share: float


@dataclass
class LayerResult:
    """All routes of one layer, what they come to, and what went wrong with ours if anything did."""

    layer: Layer
    batch: int
    floor: Floor
    flops: int
    least_bytes: int
    input_sets: int
    entries: list[Entry]
    comparisons: dict[str, Comparison]
    failure: str | None

    def largest_error(self, *, ours: bool, route: str | None = None) -> float | None:
        """The largest error among our routes or the rivals, or of one route; None if none was checked."""
        errors = [
            entry.error
            for entry in self.entries
            if entry.error is not None and entry.ours is ours and route in (None, entry.route)
        ]
        return max(errors, default=None)

    def as_json(self) -> dict[str, Any]:
        plain = {
            name: getattr(self, name) for name in ("batch", "flops", "least_bytes", "input_sets", "failure")
        }
        return {
            "name": self.layer.name,
            "layer": asdict(self.layer),
            **plain,
            "floor": asdict(self.floor),
            "routes": [entry.as_json() for entry in self.entries],
            "comparisons": {launch: asdict(comparison) for launch, comparison in self.comparisons.items()},
        }


@dataclass(frozen=True)
class LayersResult:
    """A suite: its layers in measured order, those the budget left out, those that broke off and why."""

    suite: str
    ceilings: Ceilings
    results: list[LayerResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broke_off: list[str] = field(default_factory=list)

    def ordered(self, launch: str) -> list[LayerResult]:
        """Layers compared under `launch`, the slowest against its rival first."""
        compared = [result for result in self.results if launch in result.comparisons]
        return sorted(compared, key=lambda result: result.comparisons[launch].speedup.median)

    @property
    def launches(self) -> list[str]:
        return sorted({launch for result in self.results for launch in result.comparisons})

    def summary(self, launch: str) -> dict[str, Any]:
        """Geometric mean of the speed-ups, and the names of what was faster, even and slower."""
        ordered = self.ordered(launch)
        by_verdict = {
            kind: [one.layer.name for one in ordered if one.comparisons[launch].verdict == kind]
            for kind in ("slower", "even", "faster")
        }
        return {
            "geometric_mean_speedup": geometric_mean(
                [one.comparisons[launch].speedup.median for one in ordered]
            ),
            **by_verdict,
        }

    @property
    def failures(self) -> list[str]:
        wrong = [f"{result.layer.name}: {result.failure}" for result in self.results if result.failure]
        return wrong + self.broke_off

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "rule": RULE,
            "ceilings": self.ceilings.as_json(),
            "summary": {launch: self.summary(launch) for launch in self.launches},
            "failures": self.failures,
            "left_out": self.left_out,
            "layers": [result.as_json() for result in self.results],
        }


def judge(entries: Sequence[Entry], dtype: torch.dtype) -> str | None:
    """Refuse rivals that compute something else, and say what is wrong with ours; None if nothing is.

    Eager's error, which both bounds refer to, is the one of the same memory format.
    """
    failures = []
    eager = {entry.memory_format: entry.error for entry in entries if entry.route == BASELINE}
    for entry in entries:
        if entry.ours and entry.refused is not None:
            failures.append(f"{entry.route} ({entry.memory_format}) did not run: {entry.refused}")
        if entry.error is None:
            continue
        eager_error = eager.get(entry.memory_format) or 0.0
        allowed = (allowed_for_us if entry.ours else allowed_for_rivals)(eager_error, dtype)
        if entry.error <= allowed:
            continue
        entry.refused = f"wrong result: relative error {entry.error:.2e}, at most {allowed:.2e} is allowed"
        if entry.ours:
            failures.append(f"{entry.route} ({entry.memory_format}): {entry.refused}")
    return "; ".join(failures) or None


def compare(entries: Sequence[Entry], floor: Floor) -> dict[str, Comparison]:
    """Fused against the best rival for every way of launching under which both were timed and right.

    Where a route has several memory formats, its best counts, for us as for rivals.
    """
    usable = [entry for entry in entries if entry.refused is None]
    comparisons = {}
    for launch in sorted({launch for entry in usable for launch in entry.samples}):
        timed = [entry for entry in usable if launch in entry.samples]
        ours, rivals = [e for e in timed if e.ours], [e for e in timed if not e.ours]
        if not ours or not rivals:
            continue
        own, rival = (min(side, key=lambda e: summarize(e.samples[launch]).median) for side in (ours, rivals))
        own_seconds = summarize(own.samples[launch])
        speedup = paired_ratio(rival.samples[launch], own.samples[launch])
        comparisons[launch] = Comparison(
            fused_seconds=own_seconds,
            rival=rival.route,
            rival_seconds=summarize(rival.samples[launch]),
            speedup=speedup,
            verdict=verdict(speedup),
            roofline_share=share(floor.seconds, own_seconds.median),
        )
    return comparisons
