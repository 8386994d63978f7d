"""``report``: what of a network is fused, and why the rest is not."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_cna.fusion import checks
from fused_cna.fusion.fuse import copy_of, fuse_in_place, run_once, trace_ahead
from fused_cna.fusion.records import OVERLAYS, LayerRecord, records_of, traces_of
from fused_cna.fusion.trace import left_as_it_is

_STEM_CHANNELS = 4
"""The kernel for so few input channels reads a weight in any layout."""

_PYTHON_CODE = ("hook", "forward of its own")
"""In the reasons of layers that are left alone since Python code runs around them."""


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
    cuda_graphs: tuple[str, ...] | None = None
    """The calls that are CUDA graphs, and why others are not; None where none was asked for."""

    @property
    def fused(self) -> tuple[LayerRecord, ...]:
        """The convolutions that are computed with something else."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerRecord, ...]:
        """The convolutions that are not."""
        return tuple(layer for layer in self.layers if not layer.fused)

    @property
    def norms_fused(self) -> int:
        """How many pairs of convolution and batch norm are one call."""
        return sum("norm" in layer.parts.split(" + ") for layer in self.layers)

    @property
    def additions_fused(self) -> int:
        """How many residual additions are in the call of a convolution."""
        return sum("add" in layer.parts.split(" + ") for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(line, 100, subsequent_indent=" " * 7, break_on_hyphens=False)
            for line in _lines(self)
        )


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
        FusionError: a plain network that :func:`fuse` refuses or that cannot be copied, or one that does not
            run on the example inputs.
    """
    checks.check_module(model, "report")
    inputs = checks.as_arguments(example_inputs)
    network = model = getattr(model, "_orig_mod", model)
    overlays = [vars(module)[OVERLAYS] for module in model.modules() if OVERLAYS in vars(module)]
    if not overlays:
        checks.check_network(model)
    if not overlays or (inputs is not None and any(module.training for module in model.modules())):
        network = copy_of(model)
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
    convs = {path: part for path, part in network.named_modules() if isinstance(part, nn.Conv2d)}
    fused = {layer.name for layer in layers if layer.fused and not is_frozen}
    return FusionReport(
        network=kind,
        is_fused=bool(overlays),
        layers=tuple(layers),
        untraceable=untraceable,
        as_written=tuple(
            path or kind
            for path, part in network.named_modules()
            if not part.training and traces_of(part) and not any(one.holds(part) for one in traces_of(part))
        ),
        repacked=tuple(path for path, conv in convs.items() if path in fused and _is_repacked(conv)),
        is_training=model.training,
        is_frozen=is_frozen,
        cuda_graphs=_cuda_graphs(network),
    )


def _cuda_graphs(network: nn.Module) -> tuple[str, ...] | None:
    replays = getattr(vars(network).get(OVERLAYS), "replays", None)
    return None if replays is None else tuple(replays.lines())


def _is_repacked(conv: nn.Conv2d) -> bool:
    """Whether the plans for a convolution copy its weight, as its channels are not next to each other."""
    is_stem = conv.groups == 1 and conv.in_channels <= _STEM_CHANNELS
    return not is_stem and conv.weight.shape[1] > 1 and conv.weight.stride(1) != 1


def _lines(report: FusionReport) -> Iterator[str]:
    if not report.layers:
        yield f"{report.network}: there is no convolution (nn.Conv2d) in it, so there is nothing to fuse"
        return
    state = ("frozen" if report.is_frozen else "fused") if report.is_fused else "not fused; fuse() would fuse"
    yield (
        f"{report.network}, {state}: {len(report.fused)} of {len(report.layers)} convolutions, with "
        f"{report.norms_fused} batch norms and {report.additions_fused} residual additions"
    )
    rows: dict[str, list[LayerRecord]] = {}
    for layer in report.layers:
        # What follows a colon is said of this layer alone, and so are numbers.
        reason = re.sub(r"\d+ places", "several places", layer.reason.partition(":")[0])
        rows.setdefault(f"{layer.parts} ({reason})" if reason else layer.parts, []).append(layer)
    for what, layers in sorted(rows.items(), key=lambda row: -len(row[1])):
        seeming = sum(layer.looks_fusible for layer in layers)
        names = _names(layer.name for layer in layers)
        yield f"{len(layers):5}  {what}{f', {seeming} look fusible' if seeming else ''}: {names}"
    for name, reason in report.untraceable.items():
        yield f"Cannot be followed, and runs as it was written: {name or 'the network itself'}: {reason}"
    by_python = any(words in layer.reason for layer in report.layers for words in _PYTHON_CODE)
    if report.untraceable or by_python:
        yield 'torch.compile(model, backend="fused_cna") follows most Python code, hooks too, and fuses that.'
    if report.is_training:
        yield "It is in training mode and runs as it was written, live; once eval() is called it runs fused."
    if report.as_written:
        changed = _names(report.as_written)
        yield f"Changed since it was fused, and so run as it was written: {changed}. Call fuse() again."
    if report.cuda_graphs is not None:
        yield from [f"CUDA graph of {one}" for one in report.cuda_graphs] or ["CUDA graphs: none yet"]
    if report.repacked:
        yield f"A GPU repacks these weights on every call, which explain() prices: {_names(report.repacked)}."
        yield "model.to(memory_format=torch.channels_last) spares that."


def _names(names: Iterable[str]) -> str:
    """The first names, one for all that differ in numbers only."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name or "(itself)")
    said = [f"{one} ({len(same)} times)" if len(same) > 1 else same[0] for one, same in alike.items()]
    return ", ".join([*said[:4], *[f"and {len(said) - 4} more"][: len(said) > 4]])
