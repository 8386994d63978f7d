"""What was measured on a whole network, what it comes to, and whether the goals are met; as JSON and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from bench.entry import Entry
from bench.model_cases import GOALS, Case
from bench.model_routes import EAGER, FROZEN, FUSED, INDUCTOR_FROZEN
from bench.report import ratio_text
from bench.stats import Summary, paired_ratio, summarize, verdict
from bench.summary import LAUNCHES


@dataclass
class ModelEntry(Entry):
    """One route on one network. Errors are the largest of an image, relative to float64.

    `agreement` is the part of images, or pixels or anchors, with the class that float64 gives them;
    `setup_seconds` what fusing or compiling took; `speedups` the time of the reference, by way of launching,
    over this route's, paired by round; `left_out` why it was not tried; `fused_calls` how many of
    `conv_calls` a fused network fuses; `notes` warnings.
    """

    agreement: float | None = None
    setup_seconds: float | None = None
    fused_calls: int | None = None
    conv_calls: int | None = None
    left_out: str | None = None
    notes: list[str] = field(default_factory=list)
    speedups: dict[str, Summary] = field(default_factory=dict)


@dataclass
class ModelResult:
    """All routes of one case. `references` names, by way of launching, the route that others are held to.

    `inductor_over_frozen` is inductor's time with frozen weights over a frozen network's, where both ran.
    """

    case: Case
    image_size: int
    images: str
    entries: list[ModelEntry]
    references: dict[str, str] = field(default_factory=dict)
    inductor_over_frozen: Summary | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return self.case.name

    def entry(self, route: str) -> ModelEntry | None:
        return next((entry for entry in self.entries if entry.route == route), None)

    def speedup(self, route: str, launch: str = "launched") -> Summary | None:
        """The reference's time over that of `route`; None where either was not timed."""
        entry = self.entry(route)
        return None if entry is None else entry.speedups.get(launch)

    def images_per_second(self, route: str, launch: str) -> float | None:
        entry = self.entry(route)
        if entry is None or entry.refused is not None or launch not in entry.seconds:
            return None
        return self.case.batch / entry.seconds[launch].median

    def as_json(self) -> dict[str, Any]:
        routes = []
        for entry in self.entries:
            rates = {launch: self.images_per_second(entry.route, launch) for launch in entry.seconds}
            routes.append({**entry.as_json(), "images_per_second": rates})
        plain = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("case", "entries")
        }
        ratio = self.inductor_over_frozen
        return {
            "name": self.name,
            **asdict(self.case),
            **plain,
            "inductor_over_frozen": None if ratio is None else ratio.as_json(),
            "routes": routes,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ModelResult":
        ratio = content["inductor_over_frozen"]
        return cls(
            case=Case(**{one.name: content[one.name] for one in fields(Case)}),
            image_size=content["image_size"],
            images=content["images"],
            entries=[ModelEntry.from_json(entry) for entry in content["routes"]],
            references=dict(content["references"]),
            inductor_over_frozen=None if ratio is None else Summary(**ratio),
            failure=content["failure"],
        )


def compare(result: ModelResult, device: torch.device) -> None:
    """Fill in the reference of every way of launching, and every route's ratio to it.

    The reference is the fastest rival on a GPU, and the faster of the two eager layouts on a CPU.
    """
    usable = [entry for entry in result.entries if entry.refused is None]
    for launch in LAUNCHES:
        timed = {entry.route: entry for entry in usable if launch in entry.samples}
        rivals = [
            entry for entry in timed.values() if not entry.ours and (_on_gpu(device) or entry.route in EAGER)
        ]
        if not rivals:
            continue
        reference = min(rivals, key=lambda entry: summarize(entry.samples[launch]).median)
        result.references[launch] = reference.route
        for entry in timed.values():
            entry.speedups[launch] = paired_ratio(reference.samples[launch], entry.samples[launch])
        if FROZEN in timed and INDUCTOR_FROZEN in timed:
            result.inductor_over_frozen = paired_ratio(
                timed[INDUCTOR_FROZEN].samples[launch], timed[FROZEN].samples[launch]
            )


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True)
class GoalOutcome:
    """A goal in words, whether it is reached (None: not measured here), and the numbers that say so."""

    goal: str
    reached: bool | None
    measured: str


def goals_reached(results: Sequence[ModelResult]) -> list[GoalOutcome]:
    """The goals for fused networks on a CPU in float32; the goals of speed are for two cores."""
    cases = {result.case: result for result in results}
    outcomes = []
    for goal in GOALS:
        result = cases.get(Case(goal.network, goal.batch, "fp32"))
        ratio = None if result is None else result.speedup(FROZEN)
        text = f"{goal.network} at batch {goal.batch}: {FROZEN} >= {goal.speedup:g}x the faster eager layout"
        reached = None if ratio is None else ratio.median >= goal.speedup
        outcomes.append(GoalOutcome(text, reached, "" if ratio is None else f"{ratio.median:.2f}x"))
    behind = {one.name: one.inductor_over_frozen for one in results if one.inductor_over_frozen is not None}
    outcomes.append(_never_slower(f"{FROZEN} never behind {INDUCTOR_FROZEN}", behind))
    fused = {one.name: one.speedup(FUSED) for one in results}
    outcomes.append(
        _never_slower(
            f"{FUSED} never slower than the faster eager layout",
            {name: ratio for name, ratio in fused.items() if ratio is not None},
        )
    )
    return outcomes


def _never_slower(goal: str, ratios: dict[str, Summary]) -> GoalOutcome:
    if not ratios:
        return GoalOutcome(goal, None, "")
    slower = [f"{name} {one.median:.2f}x" for name, one in ratios.items() if verdict(one) == "slower"]
    least = min(ratios, key=lambda name: ratios[name].median)
    said = f"slower on {', '.join(slower)}" if slower else f"least on {least}, {ratio_text(ratios[least])}"
    return GoalOutcome(goal, not slower, f"{said}, of {len(ratios)} measured")


@dataclass
class ModelsResult:
    """What a run measured, and what it did not: reasons by the name of a case, or of a case's routes."""

    on_gpu: bool
    results: list[ModelResult] = field(default_factory=list)
    resumed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    broke_off: list[str] = field(default_factory=list)

    @property
    def launches(self) -> list[str]:
        return [launch for launch in LAUNCHES if any(launch in one.references for one in self.results)]

    @property
    def routes(self) -> list[str]:
        """The names of all routes that a result has, in order."""
        return list(dict.fromkeys(entry.route for one in self.results for entry in one.entries))

    @property
    def failures(self) -> list[str]:
        return [f"{one.name}: {one.failure}" for one in self.results if one.failure] + self.broke_off

    @property
    def goals(self) -> list[GoalOutcome]:
        return [] if self.on_gpu else goals_reached(self.results)

    def put(self, result: ModelResult) -> None:
        """File a result in place of one of the same case, or as the last."""
        for index, before in enumerate(self.results):
            if before.case == result.case:
                self.results[index] = result
                return
        self.results.append(result)

    def as_json(self) -> dict[str, Any]:
        return {
            "goals": [asdict(goal) for goal in self.goals],
            "failures": self.failures,
            "left_out": self.left_out,
            "rows": [result.as_json() for result in self.results],
        }
