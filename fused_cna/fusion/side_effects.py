"""What running a network's code leaves behind besides a result."""

import copy
import random
from collections import deque
from typing import Any

import torch
from torch import nn


class SideEffects:
    """What running Python code leaves behind besides its result: attributes, and random numbers drawn."""

    def __init__(self, network: nn.Module) -> None:
        self._attributes = [(module, _copy_of(vars(module))) for module in network.modules()]
        self._random = (random.getstate(), torch.get_rng_state())

    def undo(self) -> str:
        """Put attributes back as they were; which effect there was, in words, empty for none."""
        effect = ""
        state, torch_state = self._random
        if random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state):
            effect = "its forward draws random numbers"
        for module, before in self._attributes:
            if not _same(vars(module), before):
                effect = f"its forward changes attributes of {type(module).__name__}"
                _restore(vars(module), before)
        return effect


def _copy_of(attributes: dict[str, Any]) -> dict[str, Any]:
    containers = (dict, list, set, deque)
    return {
        name: (value, copy.copy(value) if isinstance(value, containers) else None)
        for name, value in attributes.items()
    }


def _same(attributes: dict[str, Any], before: dict[str, Any]) -> bool:
    if attributes.keys() != before.keys():
        return False
    return all(
        attributes[name] is value and (content is None or _same_content(value, content))
        for name, (value, content) in before.items()
    )


def _same_content(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.clear()
    for name, (value, content) in before.items():
        attributes[name] = value
        if content is not None and not _same_content(value, content):
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
