"""What fusing a network did, as data."""

import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fused_cna.modules import ConvNormAct, fused_epilogue


class FusionError(RuntimeError):
    """A network that cannot be fused as asked; the message says why, and what to do."""


def first_line(error: BaseException) -> str:
    """An error as a part of a sentence."""
    said = str(error).strip().partition("\n")[0]
    return textwrap.shorten(said, 200, placeholder="...") or type(error).__name__


@dataclass
class LayerRecord:
    """One convolution of a network, each time it runs."""

    name: str
    parts: str
    """What is computed in one call, such as "conv + norm + add + relu"; "conv" where nothing is fused."""
    reason: str = ""
    """Why nothing, or less than it seems, is fused; empty where everything is."""
    looks_fusible: bool = False
    """Whether it looks as if more could have been fused."""

    @property
    def fused(self) -> bool:
        return "+" in self.parts


OVERLAYS = "fused_cna_overlay"
"""The attribute of a network that holds its overlays."""

CALLED_BY_PYTHON = "Python code that cannot be followed calls it"
_OUTSIDE = "it is outside of what was fused"


def records_of(network: nn.Module) -> tuple[list[LayerRecord], dict[str, str]]:
    """Each convolution of a network as it runs, and the modules by path that cannot be followed, and why."""
    layers: dict[tuple[str, int], LayerRecord] = {}
    untraceable: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def note(path: str, module: nn.Module, found: list[LayerRecord]) -> None:
        parts = dict(module.named_modules(remove_duplicate=False))
        uses: Counter[str] = Counter()
        for layer in found:
            seen.add(parts.get(layer.name, module))
            use = f"{path}.{layer.name}".strip("."), uses[layer.name]
            uses[layer.name] += 1
            # What one of several traces fuses counts as fused.
            if use not in layers or not layers[use].fused:
                layers[use] = replace(layer, name=use[0])

    def visit(path: str, module: nn.Module, reason: str) -> None:
        """``reason`` is why nothing around the module fuses its convolutions."""
        if module in seen:
            return
        seen.add(module)
        traces = traces_of(module)
        # A network in training mode is described as it runs after eval().
        running = [trace for trace in traces if network.training or trace.holds(module)]
        inner = dict(module.named_children())
        if isinstance(module, ConvNormAct):
            norm, act, _ = fused_epilogue(module, False)
            words = ("conv", "norm" * bool(norm), act.replace("identity", ""))
            note(path, module, [LayerRecord("conv", " + ".join(filter(None, words)))])
        elif isinstance(module, nn.Conv2d):
            note(path, module, [LayerRecord("", "conv", reason, reason == CALLED_BY_PYTHON)])
        elif running:
            for trace in running:
                note(path, module, trace.layers)
            inner = {name: leaf for trace in running for name, leaf in trace.leaves.items()}
            reason = CALLED_BY_PYTHON
        elif traces:
            reason = "its network has changed since it was traced, and runs as it was written"
        elif refusals := _made(module):
            untraceable[path], reason = refusals[0], CALLED_BY_PYTHON
        elif OVERLAYS in vars(module) and reason == _OUTSIDE:
            reason = "its network was not called yet, which traces it: give report() example_inputs"
        for name, part in inner.items():
            visit(f"{path}.{name}".lstrip("."), part, reason)

    visit("", network, _OUTSIDE)
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module not in seen:
            layers[path, 0] = LayerRecord(path, "conv", "it does not run in eval mode")
    return list(layers.values()), untraceable


def traces_of(module: nn.Module) -> list[Any]:
    """The overlays that were made for a module."""
    return [made for made in _made(module) if not isinstance(made, str)]


def _made(module: nn.Module) -> list[Any]:
    return [*getattr(vars(module).get(OVERLAYS), "made", {}).values()]
