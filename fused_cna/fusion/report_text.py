"""A report of a fusion as a text to read: rows of like layers, then totals, then reasons."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_cna.fusion.reporting import FusionReport, LayerReport, PlannedCall

_WIDTH = 100
_NAME_WIDTH = 40

_ROWS = 40
"""With more rows than these, stages of a network are merged too."""

_NAMES_PER_REASON = 4
_PLANS = 12


def text_of(report: "FusionReport") -> str:
    """The report as lines of at most 100 columns, but for what cannot be broken."""
    if not report.layers:
        return f"{report.network}: there is no convolution (nn.Conv2d) in it, so there is nothing to fuse"
    sections = [[_headline(report)], _table(report), _totals(report), _reasons(report)]
    sections += [_python_code(report), _plans(report), list(_notes(report))]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _headline(report: "FusionReport") -> str:
    count = f"{len(report.fused)} of {len(report.layers)} convolutions"
    if report.is_fused:
        return f"{report.network}{', frozen' if report.is_frozen else ''}: {count} are fused"
    return f"{report.network}, which is not fused: fuse() would fuse {count}"


@dataclass
class _Row:
    """Layers that differ in numbers of their names only."""

    layers: list["LayerReport"] = field(default_factory=list)

    def name(self) -> str:
        """Their common name, with stars for numbers that differ."""
        tokens = zip(*(re.split(r"(\d+)", layer.name) for layer in self.layers), strict=True)
        return "".join(token[0] if len(set(token)) == 1 else "*" for token in tokens) or "(itself)"


def _table(report: "FusionReport") -> list[str]:
    rows = _rows(report.layers, kept=1)
    if len(rows) > _ROWS:
        rows = _rows(report.layers, kept=0)
    cells = [("layer", "times", "computed in one call", f"kernel on {report.planned_for}")]
    cells += [
        (_shortened(row.name()), str(len(row.layers)), row.layers[0].parts, row.layers[0].kernel or "-")
        for row in rows
    ]
    columns = 4 if report.planned_for else 3
    widths = [max(len(row[column]) for row in cells) for column in range(columns)]
    return [
        "  "
        + "  ".join((row[c].rjust if c == 1 else row[c].ljust)(widths[c]) for c in range(columns)).rstrip()
        for row in cells
    ]


def _rows(layers: Iterable["LayerReport"], kept: int) -> list[_Row]:
    """Layers by name, up to the numbers in it but the first ``kept``, and by what becomes of them."""
    rows: dict[tuple[str, ...], _Row] = {}
    for layer in layers:
        tokens = re.split(r"(\d+)", layer.name)
        start = 2 * kept + 1
        tokens[start::2] = ["*"] * len(tokens[start::2])
        rows.setdefault(("".join(tokens), layer.parts, layer.kernel), _Row()).layers.append(layer)
    return list(rows.values())


def _shortened(name: str) -> str:
    if len(name) <= _NAME_WIDTH:
        return name
    end = (_NAME_WIDTH - 3) // 2
    return f"{name[: _NAME_WIDTH - 3 - end]}...{name[-end:]}"


def _totals(report: "FusionReport") -> list[str]:
    parts = ", ".join(f"{count} {parts}" for parts, count in report.by_parts.items())
    within = f"{report.norms_fused} batch norms and {report.additions_fused} residual additions"
    lines = [f"fused: {parts}", f"{within} are computed with a convolution"] if parts else []
    return [line for text in lines for line in _wrapped(text, "")]


def kind_of_reason(reason: str) -> str:
    """A reason without what is said of a single layer: the numbers and names that it may end with."""
    return re.sub(r"\d+ places", "several places", reason.partition(":")[0])


def _reasons(report: "FusionReport") -> list[str]:
    by_kind: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        if layer.reason:
            by_kind.setdefault(kind_of_reason(layer.reason), []).append(layer)
    if not by_kind:
        return []
    lines = ["left alone, or fused with less than it seems:"]
    for kind, layers in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        seeming = sum(layer.looks_fusible for layer in layers)
        hint = f" ({seeming} look{'s' * (seeming == 1)} fusible)" if seeming else ""
        lines += _wrapped(f"{len(layers):5}  {kind}{hint}", " " * 7)
        named = [_described(row) for row in _rows(layers, kept=1)]
        if len(named) > _NAMES_PER_REASON:
            named[_NAMES_PER_REASON:] = [f"and {len(named) - _NAMES_PER_REASON} more"]
        lines += _wrapped(" " * 9 + ", ".join(named), " " * 9)
    return lines


def _described(row: _Row) -> str:
    """The layers of a row, and where it is one what is said of it."""
    if len(row.layers) > 1:
        return f"{row.name()} ({len(row.layers)} times)"
    detail = row.layers[0].reason.partition(":")[2].strip()
    return (
        f"{row.name()} ({textwrap.shorten(detail, _NAME_WIDTH, placeholder=' ...')})"
        if detail
        else row.name()
    )


def _python_code(report: "FusionReport") -> list[str]:
    if not report.untraceable:
        return []
    lines = ["Python code that cannot be followed, and runs as it was written:"]
    for name, reason in report.untraceable.items():
        lines += _wrapped(f"  {name or 'the network itself'}: {reason}", "    ")
    return lines


def _plans(report: "FusionReport") -> list[str]:
    """The plans that take the most time, all layers together."""
    uses: dict[PlannedCall, int] = {}
    for layer in report.layers:
        for call in layer.calls:
            uses[call] = uses.get(call, 0) + 1
    if not uses:
        return []
    by_time = sorted(uses, key=lambda call: -uses[call] * call.microseconds)
    lines = [f"plans for {report.planned_for}, those that take the most time first:"]
    for call in by_time[:_PLANS]:
        measured = "measured" if call.is_tuned else "estimated"
        lines += _wrapped(
            f"  {uses[call]:3} x {call.microseconds:7.1f} us {measured}: {call.convolution}", " " * 8
        )
        lines += _wrapped(f"{' ' * 8}{call.plan}, {call.why}", " " * 8)
    if len(by_time) > _PLANS:
        lines.append(f"  and {len(by_time) - _PLANS} more, in the calls of .layers")
    return lines


def _notes(report: "FusionReport") -> Iterator[str]:
    notes = []
    if report.is_training:
        notes.append(
            "It is in training mode, in which a fused network runs as it was written, live: with the "
            "parameters and the statistics of its modules. It runs fused once eval() is called."
        )
    if report.as_written:
        names = ", ".join(report.as_written[:3])
        notes.append(
            f"Something has changed since it was fused, a module, a hook, or a mode, so this runs as it was "
            f"written: {names}. Call fuse() again."
        )
    if report.planned_for is not None and any(not layer.calls for layer in report.layers):
        notes.append("Convolutions without a kernel are torch's own.")
    if report.is_frozen:
        notes.append(
            "It is frozen: its weights are a snapshot with the batch norms folded, which does not see later "
            "changes of a parameter. On a CPU, blocks are calls of oneDNN."
        )
    elif report.device == "cpu":
        notes.append(
            "It is on a CPU, where blocks run one operation after another, as they do without fused_cna; "
            "fuse(model, freeze=True) makes them faster there."
        )
    if report.planned_for is None:
        notes.append(
            "report(model, example_inputs) adds shapes, and the kernel that the plan has for each: on the "
            'GPU of the network, else on an H100, or on the one that device="A100" names.'
        )
    for note in notes:
        yield from _wrapped(note, "")


def _wrapped(text: str, indent: str) -> Sequence[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
