"""The rows of a run together: what lost, and for each suite, batch and precision what it comes to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.layer_list import RULE
from bench.layer_result import LayerResult
from bench.roofline import Ceilings
from bench.rows import ORDER_RULE
from bench.stats import geometric_mean

LAUNCHES = {"graph": "in a CUDA graph", "launched": "launched eagerly"}
VERDICTS = ("slower", "even", "faster")


@dataclass(frozen=True)
class Group:
    """A suite at a batch and a precision, launched one way.

    `floor_covered` is which part of the suite's floor time the measured rows are; where it is 1 the whole
    suite was measured. Means are over rows, each counted once; `floor_share` and `speedup_of_sum` are over
    the summed times of all uses.
    """

    suite: str
    batch: int
    precision: str
    launch: str
    measured: int
    planned: int
    floor_covered: float
    geometric_mean: float
    geometric_mean_to_baseline: float
    speedup_of_sum: float
    floor_share: float
    worst: str
    worst_speedup: float
    slower: int
    even: int
    faster: int


@dataclass
class LayersResult:
    """What a run planned, measured, and did not: the rows the budget left out, broken off, or too large."""

    suites: dict[str, str]
    ceilings: dict[str, Ceilings]
    planned: dict[tuple[str, int, str], dict[str, float]] = field(default_factory=dict)
    """Of each suite, batch and precision, the floor seconds of each row, with its uses, by key."""
    results: list[LayerResult] = field(default_factory=list)
    resumed: int = 0
    left_out: list[str] = field(default_factory=list)
    broke_off: list[str] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)

    def ordered(self, launch: str) -> list[LayerResult]:
        """Rows compared under `launch`, the slowest against its rival first."""
        return slowest_first(self.results, launch)

    @property
    def launches(self) -> list[str]:
        found = {launch for result in self.results for launch in result.comparisons}
        return [launch for launch in LAUNCHES if launch in found]

    def by_verdict(self, launch: str) -> dict[str, list[str]]:
        ordered = self.ordered(launch)
        return {
            kind: [one.name for one in ordered if one.comparisons[launch].verdict == kind]
            for kind in VERDICTS
        }

    def groups(self) -> list[Group]:
        """One per suite, batch, precision and way of launching that has a row."""
        found = []
        for launch in self.launches:
            for key, floors in self.planned.items():
                suite, batch, precision = key
                rows = [
                    one
                    for one in self.ordered(launch)
                    if (one.row.batch, one.row.precision) == (batch, precision) and suite in one.row.uses
                ]
                if rows:
                    found.append(_group(suite, launch, rows, floors))
        return found

    @property
    def failures(self) -> list[str]:
        wrong = [f"{result.name}: {result.failure}" for result in self.results if result.failure]
        return wrong + self.broke_off

    def as_json(self) -> dict[str, Any]:
        return {
            "suites": self.suites,
            "rule_of_default": RULE,
            "rule_of_order": ORDER_RULE,
            "ceilings": {precision: ceilings.as_json() for precision, ceilings in self.ceilings.items()},
            "groups": [asdict(group) for group in self.groups()],
            "slower": {launch: self.by_verdict(launch)["slower"] for launch in self.launches},
            "failures": self.failures,
            "left_out": self.left_out,
            "too_large": self.too_large,
            "rows": [result.as_json() for result in self.results],
        }


def slowest_first(results: Sequence[LayerResult], launch: str) -> list[LayerResult]:
    """The results that have a comparison under `launch`."""
    compared = [result for result in results if launch in result.comparisons]
    return sorted(compared, key=lambda result: result.comparisons[launch].speedup.median)


def _group(suite: str, launch: str, rows: list[LayerResult], floors: dict[str, float]) -> Group:
    compared = [(one.row.uses[suite], one.comparisons[launch]) for one in rows]
    fused, rival = (
        sum(uses * getattr(comparison, side).median for uses, comparison in compared)
        for side in ("fused_seconds", "rival_seconds")
    )
    verdicts = [comparison.verdict for _, comparison in compared]
    baseline = [one.against_baseline[launch].speedup.median for one in rows if launch in one.against_baseline]
    return Group(
        suite=suite,
        batch=rows[0].row.batch,
        precision=rows[0].row.precision,
        launch=launch,
        measured=len(rows),
        planned=len(floors),
        floor_covered=sum(floors[one.row.key] for one in rows) / sum(floors.values()),
        geometric_mean=geometric_mean([comparison.speedup.median for _, comparison in compared]),
        geometric_mean_to_baseline=geometric_mean(baseline) if baseline else float("nan"),
        speedup_of_sum=rival / fused,
        floor_share=sum(uses * one.floor.seconds for one, (uses, _) in zip(rows, compared, strict=True))
        / fused,
        worst=rows[0].row.layer.name,
        worst_speedup=rows[0].comparisons[launch].speedup.median,
        **{kind: verdicts.count(kind) for kind in VERDICTS},
    )
