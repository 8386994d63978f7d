"""``report``: what of a network is fused, and why the rest is not."""

import copy
import functools
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_cna.fusion import checks
from fused_cna.fusion.fuse import fuse_in_place, run_once, trace_ahead
from fused_cna.fusion.overlay import NAME as OVERLAYS
from fused_cna.fusion.records import LayerRecord, records_of, traces_of
from fused_cna.fusion.trace import left_as_it_is

_wrap = functools.partial(textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False)

_STEM_CHANNELS = 4
"""The kernel for so few input channels reads a weight in any layout."""


@dataclass(frozen=True)
class FusionReport:
    """What of a network is fused; ``str`` gives a table to read."""

    network: str
    """Its class."""
    is_fused: bool
    """Whether it is a fused network; else this is what :func:`fuse` would make of it."""
    layers: tuple[LayerRecord, ...]
    """Every convolution at each of its uses, in the order in which they run where that is known."""
    untraceable: dict[str, str] = field(default_factory=dict)
    """Modules by name that run as Python code, as it cannot be followed, and why."""
    as_written: tuple[str, ...] = ()
    """Fused modules that run as they were written all the same, since something about them has changed."""
    repacked: tuple[str, ...] = ()
    """Fused convolutions whose weight does not lie in channels_last: a GPU repacks it on every call."""
    is_training: bool = False
    is_frozen: bool = False
    device: str = "cpu"
    """Where the network is."""

    @property
    def fused(self) -> tuple[LayerRecord, ...]:
        """The convolutions that are computed with something else."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerRecord, ...]:
        """The convolutions that are not."""
        return tuple(layer for layer in self.layers if not layer.fused)

    @property
    def by_parts(self) -> dict[str, int]:
        """How many convolutions compute what, the most frequent first."""
        return dict(Counter(layer.parts for layer in self.fused).most_common())

    @property
    def norms_fused(self) -> int:
        """How many pairs of convolution and batch norm are one call."""
        return sum("norm" in layer.parts.split(" + ") for layer in self.layers)

    @property
    def additions_fused(self) -> int:
        """How many residual additions are in the call of a convolution."""
        return sum("add" in layer.parts.split(" + ") for layer in self.layers)

    def __str__(self) -> str:
        return "\n\n".join("\n".join(lines) for lines in map(list, _sections(self)) if lines)


def report(model: nn.Module, example_inputs: Any = None) -> FusionReport:
    """Which convolutions of a network are fused with what, which are not, and why.

    Of a network that is not fused, what :func:`fuse` would make of a copy; the network stays as it is.
    ``print`` the result for a table. Which kernel runs a convolution is what :func:`explain` says.

    Args:
        model: a fused network, one that has fused networks among its modules, or a plain one.
        example_inputs: a tensor or the arguments of ``forward`` in a tuple, to report what runs in such a
            call: the network runs once, or a copy of it in eval mode where it is plain or in training mode.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``example_inputs`` no tensors.
        FusionError: a plain network that :func:`fuse` refuses as a whole, such as a quantised one; or it does
            not run on the example inputs.

    >>> print(report(torchvision.models.resnet50()))
    """
    checks.check_module(model, "report")
    inputs = checks.as_arguments(example_inputs)
    network = model = getattr(model, "_orig_mod", model)
    overlays = [module.__dict__[OVERLAYS] for module in model.modules() if OVERLAYS in module.__dict__]
    if not overlays:
        checks.check_network(model)
    if not overlays or (inputs is not None and any(module.training for module in model.modules())):
        network = copy.deepcopy(model)
    if not overlays:
        fuse_in_place(network, freeze=False)
    elif not any(one.made for one in overlays):
        with left_as_it_is(network):
            trace_ahead(network, set())
    if inputs is not None:
        run_once(network.eval(), inputs)
    layers, untraceable = records_of(network)
    kind = getattr(model, "plain_class", type(model)).__name__
    is_frozen = any(one.frozen for one in overlays)
    fused = {layer.name for layer in layers if layer.fused and not is_frozen}
    return FusionReport(
        network=kind,
        is_fused=bool(overlays),
        layers=tuple(layers),
        untraceable=untraceable,
        as_written=tuple(path or kind for path, module in network.named_modules() if _is_as_written(module)),
        repacked=tuple(p for p, module in network.named_modules() if p in fused and _is_repacked(module)),
        is_training=model.training,
        is_frozen=is_frozen,
        device=str(next((tensor.device for tensor in model.parameters()), "cpu")),
    )


def _is_as_written(module: nn.Module) -> bool:
    traces = traces_of(module)
    return not module.training and bool(traces) and not any(trace.holds(module) for trace in traces)


def _is_repacked(module: nn.Module) -> bool:
    """Whether the plans for a convolution copy its weight, as its channels are not next to each other."""
    if not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.in_channels <= _STEM_CHANNELS):
        return False
    return module.weight.shape[1] > 1 and module.weight.stride(1) != 1


def _sections(report: FusionReport) -> Iterator[Iterable[str]]:
    if not report.layers:
        yield [f"{report.network}: there is no convolution (nn.Conv2d) in it, so there is nothing to fuse"]
        return
    count = f"{len(report.fused)} of {len(report.layers)} convolutions"
    would = f"{report.network}, which is not fused: fuse() would fuse {count}"
    yield [
        f"{report.network}{', frozen' * report.is_frozen}: {count} are fused" if report.is_fused else would
    ]
    rows = [(row[0].parts, str(len(row)), name) for name, row in _rows(report.layers)]
    width = max(len(parts) for parts, _, _ in rows)
    head = ("computed in one call", "times", "layer")
    yield [f"  {parts:{max(width, 20)}}  {times:>5}  {name}" for parts, times, name in (head, *rows)]
    within = f"{report.norms_fused} batch norms and {report.additions_fused} residual additions"
    yield [f"{within} are computed with a convolution"] if report.fused else []
    yield _reasons(report)
    yield _python_code(report)
    yield _notes(report)


def _reasons(report: FusionReport) -> Iterator[str]:
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in (layer for layer in report.layers if layer.reason):
        # What follows a colon is said of this layer alone, and so are numbers.
        kind = re.sub(r"\d+ places", "several places", layer.reason.partition(":")[0])
        kinds.setdefault(kind, []).append(layer)
    if kinds:
        yield "left alone, or fused with less than it seems:"
    for kind, layers in sorted(kinds.items(), key=lambda item: -len(item[1])):
        seeming = sum(layer.looks_fusible for layer in layers)
        hint = f" ({seeming} look{'s' * (seeming == 1)} fusible)" if seeming else ""
        yield from _wrap(f"{len(layers):5}  {kind}{hint}: {_names(layers)}", subsequent_indent=" " * 7)


def _python_code(report: FusionReport) -> Iterator[str]:
    if report.untraceable:
        yield "Python code that cannot be followed, and runs as it was written:"
    for name, reason in report.untraceable.items():
        yield from _wrap(f"  {name or 'the network itself'}: {reason}", subsequent_indent="    ")


def _notes(report: FusionReport) -> Iterator[str]:
    if report.is_training:
        yield "It is in training mode and runs as it was written, live; once eval() is called it runs fused."
    if report.as_written:
        changed = (
            f"Changed since it was fused, and so run as it was written: {', '.join(report.as_written[:3])}."
        )
        yield from _wrap(f"{changed} Call fuse() again.")
    if report.repacked:
        names = _names(layer for layer in report.layers if layer.name in report.repacked)
        repacked = f"Not in channels_last, so that a GPU repacks these weights on every call: {names}."
        advice = "model.to(memory_format=torch.channels_last) spares that; explain() says what it costs."
        yield from _wrap(f"{repacked} {advice}")
    if report.is_frozen:
        yield "Its weights are a snapshot with the batch norms folded."
    elif report.device == "cpu":
        yield "On a CPU, blocks run one operation after another; fuse(model, freeze=True) is faster there."


def _rows(layers: Iterable[LayerRecord]) -> list[tuple[str, list[LayerRecord]]]:
    """Layers that compute the same and whose names differ in numbers only, by their common name."""
    rows: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        rows.setdefault((re.sub(r"\d+", "*", layer.name), layer.parts), []).append(layer)
    return [(name if len(row) > 1 else row[0].name or "(itself)", row) for (name, _), row in rows.items()]


def _names(layers: Iterable[LayerRecord]) -> str:
    names = [f"{name} ({len(row)} times)" if len(row) > 1 else name for name, row in _rows(layers)]
    return ", ".join([*names[:4], *[f"and {len(names) - 4} more"][: len(names) > 4]])
