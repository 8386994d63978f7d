"""Whether plain torch.fx can follow a network, with no other help than its library declares."""

import copy
import importlib
from typing import Any

import torch
from torch import nn


class _Tracer(torch.fx.Tracer):
    def __init__(self, leaves: tuple[type[nn.Module], ...], functions: tuple[Any, ...]) -> None:
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def is_traceable(network: nn.Module, library: str) -> bool:
    """Whether `torch.fx` traces the whole network; what timm declares untraceable is a leaf for it."""
    leaves: tuple[type[nn.Module], ...] = ()
    functions: tuple[Any, ...] = ()
    if library == "timm":
        declared = importlib.import_module("timm.layers")
        leaves, functions = tuple(declared.get_notrace_modules()), tuple(declared.get_notrace_functions())
    # Tracing leaves its stand-ins for tensors in whatever a network caches.
    sketch = copy.deepcopy(
        network, {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    )
    try:
        _Tracer(leaves, functions).trace(sketch)
    except Exception:
        # Code that is not made for tracing fails in any way it likes.
        return False
    return True
