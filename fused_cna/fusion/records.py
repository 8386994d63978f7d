"""What fusing a network did, as data."""

from dataclasses import dataclass, field
from typing import Any

from fused_cna.fusion.calls import Act, Norm
from fused_cna.fusion.matching import Group, Matches

NAME = "_fused_cna_record"
"""The attribute of a fused network that holds its record."""


class FusionError(RuntimeError):
    """A network that cannot be fused as asked; the message says why, and what to do."""


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


@dataclass
class FusionRecord:
    """What fusing a network did."""

    layers: list[LayerRecord]
    untraceable: dict[str, str] = field(default_factory=dict)
    """Modules by path whose Python code could not be followed, and why."""
    swaps: list[Any] = field(default_factory=list)


def parts_of(group: Group, matches: Matches) -> str:
    """The parts of a group in the order of computation."""
    words = ["pad"] if group.pad is not None else []
    words.append("conv")
    norm = matches.calls.get(group.norm) if group.norm is not None else None
    act = matches.calls.get(group.act) if group.act is not None else None
    if isinstance(norm, Norm):
        words.append("norm")
        if norm.act != "identity":
            words.append(norm.act)
    tail = [act.name] if isinstance(act, Act) else []
    if group.add is not None:
        tail = ["add", *tail] if group.residual_order == "add_act" else [*tail, "add"]
    return " + ".join([*words, *tail])
