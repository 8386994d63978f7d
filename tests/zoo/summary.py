"""What all results say together: the goals, and docs/zoo.md."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.zoo.judge import Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"
PAIRS_GOAL = 0.95
ADDS_GOAL = 0.90
EXAMPLES = 3


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    done: int
    of: int

    @property
    def fraction(self) -> float:
        return self.done / self.of if self.of else 1.0

    def __str__(self) -> str:
        """Rounded down, so that 100 % is all of them."""
        return f"{self.done:,} of {self.of:,} ({int(1000 * self.fraction) / 10} %)"


@dataclass(frozen=True)
class Totals:
    """The sums over some networks."""

    results: Sequence[Result]

    @property
    def convolutions(self) -> int:
        return sum(result.convolutions for result in self.results)

    @property
    def pairs(self) -> Share:
        return Share(sum(r.fused_pairs for r in self.results), sum(r.pairs for r in self.results))

    @property
    def adds(self) -> Share:
        return Share(sum(r.fused_adds for r in self.results), sum(r.adds for r in self.results))

    @property
    def frozen(self) -> Share:
        """Networks in which `freeze=True` folds all that is fused without it."""
        some = [result for result in self.results if result.fused_calls]
        return Share(sum(r.frozen_calls >= r.fused_calls for r in some), len(some))

    @property
    def traceable(self) -> "Totals":
        return Totals([result for result in self.results if result.traceable])

    @property
    def wrong(self) -> list[Result]:
        return [result for result in self.results if result.wrong]

    def shortfalls(self) -> list[str]:
        """The goals that are missed, in words."""
        missed = []
        if self.pairs.fraction < PAIRS_GOAL:
            missed.append(f"foldable pairs fused: {self.pairs}, the goal is {PAIRS_GOAL:.0%}")
        adds = self.traceable.adds
        if adds.fraction < ADDS_GOAL:
            missed.append(f"residual adds fused in traceable networks: {adds}, the goal is {ADDS_GOAL:.0%}")
        return missed


def failures(results: Iterable[Result]) -> list[str]:
    """Every network that is not right, and how."""
    found = []
    for result in results:
        found += [f"{result.name}: wrong: {wrong}" for wrong in result.wrong]
        found += [f"{result.name}: {result.error}"] if result.error else []
        found += [f"{result.name}: no telling whether the {kind} was left out" for kind in result.unseen]
    return found


def grouped(missed: Iterable[tuple[str, list[tuple[str, str]]]]) -> list[tuple[str, int, list[str]]]:
    """Reasons, how often each, and where, the most frequent first; what a reason lists is left out of it."""
    places: dict[str, list[str]] = defaultdict(list)
    for network, layers in missed:
        for layer, reason in layers:
            places[_kind_of(reason)].append(f"{network} {layer}")
    return sorted(
        ((reason, len(where), where) for reason, where in places.items()), key=lambda row: (-row[1], row[0])
    )


def _kind_of(reason: str) -> str:
    return "; ".join(": ".join(part.split(": ")[:2]) for part in reason.split("; "))


def document(results: Sequence[Result], versions: dict[str, str], frozen: bool) -> str:
    """docs/zoo.md."""
    totals = Totals(results)
    with_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    rows = [
        f"| {result.name} | {result.convolutions} | {_of(result.fused_pairs, result.pairs)} "
        f"| {_of(result.fused_adds, result.adds)} | {'yes' if result.traceable else 'no'} |"
        for result in results
    ]
    sections = [
        _INTRODUCTION.format(
            networks=len(results),
            versions=with_versions,
            frozen=" The same holds for `fuse(model, freeze=True)`." if frozen else "",
        ),
        _table(
            ("all networks", ""),
            [
                ("networks", f"{len(results)}"),
                ("of them wrong", f"{len(totals.wrong)}"),
                ("convolutions", f"{totals.convolutions:,}"),
                ("foldable pairs fused", str(totals.pairs)),
                ("residual adds fused", str(totals.adds)),
                ("the same in traceable networks", str(totals.traceable.adds)),
                *([("networks that freeze=True folds", str(totals.frozen))] if frozen else []),
                ("traceable networks", f"{len(totals.traceable.results)}"),
            ],
        ),
        "## What is not fused, and why\n\nWhat is computed with the convolution, and the report's reason.",
        _reasons("foldable pair", ((r.name, r.missed_pairs) for r in results)),
        _reasons("residual add", ((r.name, r.missed_adds) for r in results)),
        "## Every network\n\nFused of all. `tv`, `tvseg` and `tvdet` are torchvision's.",
        "| network | convolutions | pairs | residual adds | traceable |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(rows),
    ]
    return "\n\n".join(sections) + "\n"


def _of(done: int, of: int) -> str:
    return f"{done} of {of}" if of else "none"


def _reasons(what: str, missed: Iterable[tuple[str, list[tuple[str, str]]]]) -> str:
    rows = []
    for reason, count, places in grouped(missed):
        more = f", and {count - EXAMPLES} more" if count > EXAMPLES else ""
        rows.append((reason, str(count), ", ".join(f"`{place}`" for place in places[:EXAMPLES]) + more))
    return _table((what, "how many", "where"), rows) if rows else f"Every {what} is fused."


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


_INTRODUCTION = """\
# The zoo

Written by `make zoo`: {networks} networks with {versions}, random weights, and
statistics that are no standardisation, fused by `fuse(model, example_inputs=...)` and run beside the
original in float32, on images of two sizes where the network takes them. No result may be further from
the original in float64 than three times the original is in float32, or 4e-6 if that is more. In every
network a norm, an activation and an addition are also left out on purpose, and the comparison has to see
it.{frozen}

The counts are the judge's own, from one eager run of the original (`tests/zoo/dataflow.py` defines them):

- *Foldable pair*: an `nn.Conv2d` whose output only a batch norm with running statistics takes; no computed
  or shared weights, no hooks, and the same norm wherever the convolution is called.
- *Residual add*: an addition of two tensors of equal shape, of which one is the output of a convolution, or
  of its norm, or of one activation behind either, that nothing else takes.
- *Fused*: seen in the calls that the fused network makes, not in what it says of itself.
- *Traceable*: plain `torch.fx` traces the whole network, with the leaves that timm declares."""
