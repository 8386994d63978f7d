"""What was measured: one record for a layer, a network or a call, its statistics, and JSON and back."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

SCHEMA, OLD_SCHEMA = 4, 3
LAUNCHES = {"graph": "in a CUDA graph", "launched": "launched eagerly"}
KINDS = {"layers": "layer", "models": "network", "overhead": "call"}


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of repeated measurements, in the unit of the samples."""

    median: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Of a speed-up: 'faster' or 'slower' when three quarters of the rounds say so, else 'even'."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "even"


def summarize(samples: Sequence[float]) -> Summary:
    """Median and lower and upper quartile of `samples` (ValueError if there are none)."""
    if not samples:
        raise ValueError("summarize needs at least one sample, got none")
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return Summary(median(samples), low, high, len(samples))


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean of positive `ratios` (ValueError if there are none, or one is not positive)."""
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"geometric_mean needs at least one ratio, all positive, got {list(ratios)}")
    return math.exp(math.fsum(math.log(ratio) for ratio in ratios) / len(ratios))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Ratios of times taken in the same rounds: pairing cancels what slows both, as another process does."""
    return summarize([above / below for above, below in zip(numerator, denominator, strict=True)])


@dataclass
class Entry:
    """One route in one memory format; `seconds` per call by way of launching.

    `refused` says why it was not timed, `no_graph` why it is not in a CUDA graph. `speedups` are the time of
    the fastest eager route over this one's, by round. Of networks: `agreement`, the part of images
    with the class that float64 gives them, and `fused_calls` of how many. `setup_seconds`: to make it, fuse
    or compile it.
    """

    route: str
    memory_format: str
    ours: bool = False
    eager: bool = False
    refused: str | None = None
    no_graph: str | None = None
    error: float | None = None
    agreement: float | None = None
    first_call_seconds: float | None = None
    setup_seconds: float | None = None
    fused_calls: int | None = None
    conv_calls: int | None = None
    notes: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, Summary] = field(default_factory=dict)
    speedups: dict[str, Summary] = field(default_factory=dict)

    def speedup_over(self, other: "Entry", launch: str) -> Summary:
        """The time of `other` over this one's; of medians alone where they come from a file."""
        if self.samples and other.samples:
            return paired_ratio(other.samples[launch], self.samples[launch])
        ratio = other.seconds[launch].median / self.seconds[launch].median
        return Summary(ratio, ratio, ratio, 1)


def fastest(entries: Iterable[Entry], launch: str) -> Entry | None:
    """Of those that were right and timed."""
    timed = [one for one in entries if launch in one.seconds and one.refused is None]
    return min(timed, key=lambda entry: entry.seconds[launch].median) if timed else None


@dataclass(frozen=True)
class Comparison:
    """Our fastest route against a rival, launched one way. `speedup` is rival / ours: below 1 ours lost.

    `roofline_share`, of layers, is the part of the roofline that ours reaches: 1.0 is the floor itself.
    """

    ours: str
    seconds: Summary
    rival: str
    rival_seconds: Summary
    speedup: Summary
    verdict: str
    roofline_share: float | None


@dataclass
class Record:
    """A layer, a network or a call (`kind`), with all its routes. `key` finds it again in another file.

    `comparisons` are with the fastest rival, chosen after measuring; those with eager are the `speedups`.
    `facts` are what else is known of it, by kind: see bench/results/README.md.
    """

    kind: str
    key: str
    name: str
    batch: int
    precision: str
    uses: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    routes: list[Entry] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    failure: str | None = None

    def compare(self) -> None:
        """Fill in the comparisons. Only what was right counts; of several memory formats the fastest does."""
        floor = self.facts.get("floor", {}).get("seconds")
        for launch in LAUNCHES:
            eager = fastest((one for one in self.routes if one.eager), launch)
            ours = fastest((one for one in self.routes if one.ours), launch)
            rival = fastest((one for one in self.routes if not one.ours), launch)
            for one in self.routes:
                if eager is not None and launch in one.seconds:
                    one.speedups[launch] = one.speedup_over(eager, launch)
            if ours is not None and rival is not None:
                seconds, ratio = ours.seconds[launch], ours.speedup_over(rival, launch)
                share = floor / seconds.median if floor else None
                theirs = rival.route, rival.seconds[launch]
                found = Comparison(ours.route, seconds, *theirs, ratio, ratio.verdict, share)
                self.comparisons[launch] = found

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        for entry in content["routes"]:
            del entry["samples"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any], kind: str) -> "Record":
        """What `as_json` wrote, or a row of schema 3 of that kind, whose comparisons are made anew."""
        old = "facts" not in content
        read = _from_schema_3(content, kind) if old else content
        known = [one.name for one in fields(Entry)]
        routes = [Entry(**{name: one[name] for name in known if name in one}) for one in read["routes"]]
        for one in routes:
            one.seconds, one.speedups = (_summaries(found) for found in (one.seconds, one.speedups))
            # JSON has no infinity: it is a word there.
            one.error = None if one.error is None else float(one.error)
        made = cls(
            **{one.name: read[one.name] for one in fields(cls) if one.name in read} | {"routes": routes}
        )
        for launch, one in read["comparisons"].items():
            made.comparisons[launch] = Comparison(**one | _summaries(one))
        if old:
            made.compare()
        return made


def _summaries(found: dict[str, Any]) -> dict[str, Summary]:
    return {name: Summary(**one) for name, one in found.items() if isinstance(one, dict)}


def _from_schema_3(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row of layers or models as it was, in the fields of a record."""
    eager = ("three-step", "eager NCHW", "eager channels_last")
    routes = [
        {
            **one,
            "eager": one["route"] in eager,
            "refused": one["refused"] or one.get("left_out"),
            "speedups": {},
        }
        for one in row["routes"]
    ]
    name = row["name"] if kind == "network" else f"{row['precision']} n{row['batch']} {row['name']}"
    kept = {name: row[name] for name in ("batch", "precision", "failure")}
    named = {"kind": kind, "key": row.get("key", name), "name": name, "uses": row.get("uses", {})}
    return {**kept, **named, "facts": row, "routes": routes, "comparisons": {}}


@dataclass
class Outcome:
    """What a job measured, what it did not and why, by name, and what broke off.

    `planned` has, of each suite, batch and precision, the floor seconds of each row with its uses, by key.
    """

    records: list[Record] = field(default_factory=list)
    resumed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    broke_off: list[str] = field(default_factory=list)
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    planned: dict[tuple[str, int, str], dict[str, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def put(self, record: Record) -> None:
        """File a record in place of one of the same key, or as the last."""
        keys = [one.key for one in self.records]
        index = keys.index(record.key) if record.key in keys else len(keys)
        self.records[index : index + 1] = [record]

    @property
    def launches(self) -> list[str]:
        return [launch for launch in LAUNCHES if any(launch in one.comparisons for one in self.records)]

    @property
    def failures(self) -> list[str]:
        return [f"{one.name}: {one.failure}" for one in self.records if one.failure] + self.broke_off

    def ordered(self, launch: str) -> list[Record]:
        """Records compared under `launch`, the slowest against its rival first."""
        compared = [one for one in self.records if launch in one.comparisons]
        return sorted(compared, key=lambda one: one.comparisons[launch].speedup.median)

    def slower(self, launch: str) -> list[Record]:
        return [one for one in self.ordered(launch) if one.comparisons[launch].verdict == "slower"]

    def groups(self) -> list[dict[str, Any]]:
        """What each suite comes to, at a batch and a precision and launched one way.

        `floor_covered` is which part of the suite's floor time the measured rows are. Means are over rows,
        each counted once; `floor_share` and `speedup_of_sum` are over the summed times of all uses.
        """
        found = []
        for launch in self.launches:
            for (suite, batch, precision), floors in self.planned.items():
                same = [
                    one for one in self.ordered(launch) if (one.batch, one.precision) == (batch, precision)
                ]
                rows = [one for one in same if suite in one.uses]
                if not rows:
                    continue
                compared = [(one.uses[suite], one.comparisons[launch]) for one in rows]
                ours = sum(uses * one.seconds.median for uses, one in compared)
                ours_at = [fastest((e for e in one.routes if e.ours), launch) for one in rows]
                eager = [one.speedups[launch].median for one in ours_at if one and launch in one.speedups]
                verdicts = [one.verdict for _, one in compared]
                group = {"suite": suite, "batch": batch, "precision": precision, "launch": launch}
                found.append(
                    group
                    | {
                        "measured": len(rows),
                        "planned": len(floors),
                        "floor_covered": sum(floors[one.key] for one in rows) / sum(floors.values()),
                        "geometric_mean": geometric_mean([one.speedup.median for _, one in compared]),
                        "geometric_mean_to_eager": geometric_mean(eager) if eager else math.nan,
                        "speedup_of_sum": sum(n * one.rival_seconds.median for n, one in compared) / ours,
                        "floor_share": sum(floors[one.key] for one in rows) / ours,
                        "worst": rows[0].name,
                        "worst_speedup": compared[0][1].speedup.median,
                        **{kind: verdicts.count(kind) for kind in ("slower", "even", "faster")},
                    }
                )
        return found

    def as_json(self) -> dict[str, Any]:
        slower = {launch: [one.name for one in self.slower(launch)] for launch in self.launches}
        made = {"failures": self.failures, "left_out": self.left_out, "slower": slower, **self.extra}
        if self.planned:
            made |= {"ceilings": self.ceilings, "groups": self.groups()}
        return {**made, "rows": [one.as_json() for one in self.records]}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` after the schema number. JSON has no infinity or NaN: they become "inf" and "nan"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(_finite_or_word({"schema": SCHEMA, **content}), indent=1, allow_nan=False)
    # A run that is killed while it writes must not take the result before with it.
    beside = path.with_suffix(".part")
    beside.write_text(written + "\n")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; ValueError if it is no result that this version of the bench can read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (SCHEMA, OLD_SCHEMA):
        raise ValueError(f"{path} should be a result of the bench with schema 3 or 4, got schema {schema}")
    return content


def read_records(path: Path, content: dict[str, Any]) -> dict[str, list[Record]]:
    """The layers and networks of a result, by job; ValueError where it has neither."""
    rows = {job: content.get(job, {}).get("rows", ()) for job in ("layers", "models")}
    if not any(rows.values()):
        raise ValueError(
            f"{path} holds no measured layers or networks: it needs a result of layers or models"
        )
    return {job: [Record.from_json(row, KINDS[job]) for row in found] for job, found in rows.items()}


def _finite_or_word(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_word(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_word(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
