"""What all results say together: the goals, and docs/zoo.md."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.zoo.judge import Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"
PAIRS_GOAL = 1.00
ADDS_GOAL = 0.98
EXAMPLES = 3


def share(done: int, of: int) -> str:
    """So many of so many, rounded down, so that 100 % is all of them."""
    return f"{done:,} of {of:,} ({1000 * done // of / 10 if of else 100.0} %)"


def totals(results: Sequence[Result], frozen: bool) -> list[tuple[str, str]]:
    """The sums over some networks, each with what it is."""
    fused = [result for result in results if result.fused_calls]
    whole = sum(result.frozen_calls >= result.fused_calls for result in fused)
    return [
        ("networks", f"{len(results)}"),
        ("of them wrong", f"{sum(bool(result.wrong) for result in results)}"),
        ("convolutions", f"{sum(result.convolutions for result in results):,}"),
        ("foldable pairs fused", share(*_pairs(results))),
        ("residual adds fused", share(*_adds(results))),
        *([("networks that freeze=True folds", share(whole, len(fused)))] if frozen else []),
    ]


def _pairs(results: Sequence[Result]) -> tuple[int, int]:
    return sum(result.fused_pairs for result in results), sum(result.pairs for result in results)


def _adds(results: Sequence[Result]) -> tuple[int, int]:
    return sum(result.fused_adds for result in results), sum(result.adds for result in results)


def shortfalls(results: Sequence[Result]) -> list[str]:
    """The goals that are missed, in words."""
    parts = (("foldable pairs", _pairs(results), PAIRS_GOAL), ("residual adds", _adds(results), ADDS_GOAL))
    return [
        f"{what} fused: {share(done, of)}, the goal is {goal:.0%}"
        for what, (done, of), goal in parts
        if done < goal * of
    ]


def failures(results: Iterable[Result]) -> list[str]:
    """Every network that is not right, and how."""
    found = []
    for result in results:
        found += [f"{result.name}: wrong: {wrong}" for wrong in result.wrong]
        found += [f"{result.name}: {result.error}"] if result.error else []
        found += [f"{result.name}: no telling whether the {kind} was left out" for kind in result.unseen]
    return found


def not_fused(results: Sequence[Result]) -> list[str]:
    """Two sections of docs/zoo.md."""
    pairs = _reasons("foldable pair", ((r.name, r.missed_pairs) for r in results))
    return [pairs, _reasons("residual add", ((r.name, r.missed_adds) for r in results))]


def _reasons(what: str, missed: Iterable[tuple[str, list[tuple[str, str]]]]) -> str:
    """Reasons, how often each, and where, the most frequent first; what a reason lists is left out of it."""
    places: dict[str, list[str]] = defaultdict(list)
    for network, layers in missed:
        for layer, reason in layers:
            kind = "; ".join(": ".join(part.split(": ")[:2]) for part in reason.split("; "))
            places[kind].append(f"`{network} {layer}`")
    rows = []
    for reason, where in sorted(places.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f", and {len(where) - EXAMPLES} more" if len(where) > EXAMPLES else ""
        rows.append((reason, str(len(where)), ", ".join(where[:EXAMPLES]) + more))
    return _table((what, "how many", "where"), rows) if rows else f"Every {what} is fused."


def document(results: Sequence[Result], versions: dict[str, str], frozen: bool) -> str:
    """docs/zoo.md."""
    introduction = _INTRODUCTION.format(
        networks=len(results),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        frozen=" The same holds for `fuse(model, freeze=True)`." if frozen else "",
    )
    sections = [
        introduction,
        _table(("all networks", ""), totals(results, frozen)),
        "## What is not fused, and why\n\nWhat is computed with the convolution, and the report's reason.",
        *not_fused(results),
        "## Every network\n\nFused of all. `tv`, `tvseg` and `tvdet` are torchvision's.",
        _table(
            ("network", "convolutions", "pairs", "residual adds"),
            [
                (r.name, str(r.convolutions), _of(r.fused_pairs, r.pairs), _of(r.fused_adds, r.adds))
                for r in results
            ],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _of(done: int, of: int) -> str:
    return f"{done} of {of}" if of else "none"


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
- *Fused*: seen in the calls that the fused network makes, not in what it says of itself."""
