"""Running a network for comparison: what it returns, and what its probed modules return on the way."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.zoo.catalogue import Entry
from tests.zoo.compare import named_leaves


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same structure with its floating-point tensors in another type."""

    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, value)


class Run:
    """One run of a network in inference mode.

    Args:
        first: the run whose results of `which.replayed` this one goes on with; None for the first.
    """

    def __init__(
        self, network: nn.Module, which: Entry, arguments: tuple[Any, ...], first: "Run | None" = None
    ) -> None:
        self.results: dict[str, Tensor] = {}
        self.replayed: dict[str, Any] = {}
        self._dtype = next(tensor for tensor in network.parameters()).dtype
        self._first = first
        with torch.inference_mode(), ExitStack() as hooks:
            for name in dict.fromkeys((*which.probes, *which.replayed)):
                module = network.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(self._hook(name, which)))
            output = network(*to_dtype(arguments, self._dtype))
        self.results.update(named_leaves(output))

    def _hook(self, name: str, which: Entry) -> Any:
        def hook(module: nn.Module, arguments: Any, result: Any) -> Any:
            if name in which.probes:
                self.results.update(named_leaves(result, name))
            if name not in which.replayed:
                return None
            self.replayed[name] = result
            return None if self._first is None else to_dtype(self._first.replayed[name], self._dtype)

        return hook
