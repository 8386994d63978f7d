"""What was measured on a row, and what it comes to: the comparison with the best rival; as JSON and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.entry import Entry
from bench.layer_list import Layer
from bench.plans import Plan
from bench.roofline import Floor, share
from bench.rows import Row
from bench.stats import Summary, paired_ratio, summarize, verdict
from bench.timing import Rotation

BASELINE = "three-step"


@dataclass(frozen=True)
class Comparison:
    """Fused against a rival, launched one way. `speedup` is rival / fused: below 1, fused lost."""

    fused_seconds: Summary
    rival: str
    rival_seconds: Summary
    speedup: Summary
    verdict: str
    roofline_share: float

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Comparison":
        names = ("fused_seconds", "rival_seconds", "speedup")
        share_read = float(content["roofline_share"])
        return cls(
            **(content | {name: Summary(**content[name]) for name in names} | {"roofline_share": share_read})
        )


@dataclass
class LayerResult:
    """All routes of one row, what they come to, and what went wrong with ours if anything did.

    `comparisons` are with the best rival, `against_baseline` with the eager three-step, by way of launching.
    """

    row: Row
    floor: Floor
    flops: int
    least_bytes: int
    rotation: Rotation
    entries: list[Entry]
    comparisons: dict[str, Comparison]
    against_baseline: dict[str, Comparison]
    failure: str | None
    plan: Plan | None = None
    why_no_plan: str | None = None

    @property
    def name(self) -> str:
        return self.row.name

    def as_json(self) -> dict[str, Any]:
        row = self.row
        plain = ("floor", "flops", "least_bytes", "comparisons", "against_baseline", "failure")
        plan = None if self.plan is None else asdict(self.plan)
        everything = asdict(self)
        return {
            "key": row.key,
            "name": row.layer.name,
            "batch": row.batch,
            "precision": row.precision,
            "uses": row.uses,
            "layer": asdict(row.layer),
            **{name: everything[name] for name in plain},
            "rotation": self.rotation.as_json(),
            "plan": plan,
            "why_no_plan": self.why_no_plan,
            "routes": [entry.as_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LayerResult":
        plan = content["plan"]
        return cls(
            row=Row(Layer(**content["layer"]), content["batch"], content["precision"], dict(content["uses"])),
            floor=Floor(**content["floor"]),
            **{name: content[name] for name in ("flops", "least_bytes", "failure", "why_no_plan")},
            rotation=Rotation(**{one.name: content["rotation"][one.name] for one in fields(Rotation)}),
            entries=[Entry.from_json(entry) for entry in content["routes"]],
            **{
                name: {launch: Comparison.from_json(one) for launch, one in content[name].items()}
                for name in ("comparisons", "against_baseline")
            },
            plan=None if plan is None else Plan(**(plan | {"tile": tuple(plan["tile"])})),
        )


def compare(entries: Sequence[Entry], floor: Floor, rivals: str | None = None) -> dict[str, Comparison]:
    """Fused against the best rival, or the route named `rivals`, for every way of launching of both.

    Only what was right counts. Where a route has several memory formats, its best counts, for us as for
    rivals.
    """
    usable = [entry for entry in entries if entry.refused is None]
    comparisons = {}
    for launch in sorted({launch for entry in usable for launch in entry.samples}):
        timed = [entry for entry in usable if launch in entry.samples]
        ours = [entry for entry in timed if entry.ours]
        others = [entry for entry in timed if not entry.ours and rivals in (None, entry.route)]
        if not ours or not others:
            continue
        own, rival = (min(side, key=lambda e: summarize(e.samples[launch]).median) for side in (ours, others))
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
