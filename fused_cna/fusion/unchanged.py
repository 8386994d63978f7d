"""What a network was when it was traced, and whether it still is: what its code can read besides tensors."""

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx, nn

from fused_cna import layers

# What fusing itself and a compiler add to a module, and what is looked at apart.
_NOT_COMPARED = ("fused_cna_overlay", "_fused_cna_record", "_compiled_call_impl", "training")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEEPEST = 4


class AsTraced:
    """The classes, attributes and children of the modules whose code a graph stands for.

    Attributes are compared by value, with what is in containers and plain objects; parameters and buffers by
    whether they are there, and their shapes.

    Args:
        network: what was traced, which is not kept, so that nothing refers in a circle.
        modules: modules in it, whether their ``forward`` was traced or their attributes were only read.
        entered: those of them whose ``forward`` is part of the graph, so that hooks on them would not run.
        live: those that are in training mode although the network is not.
    """

    def __init__(
        self,
        network: nn.Module,
        modules: Iterable[nn.Module],
        entered: Collection[nn.Module],
        live: Collection[nn.Module],
    ) -> None:
        self._network = _State(network)
        self._modules = [(module, type(module), _State(module), module in live) for module in modules]
        self._entered = list(entered)

    def holds(self, network: nn.Module) -> bool:
        """Whether all is as it was, without hooks inside, and in eval mode."""
        if not self._network.is_of(network):
            return False
        for module, kind, state, training in self._modules:
            if type(module) is not kind or module.training is not training or not state.is_of(module):
                return False
        # Hooks of the network itself run before and after its forward, as always.
        return not any(map(layers.has_hooks, self._entered)) and not layers.has_global_hooks()


class _State:
    """What one module holds besides its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self._is_graph = isinstance(module, fx.GraphModule)
        self._attributes = self._attributes_of(module)
        self._contents = {
            name: content
            for name, value in self._attributes.items()
            if name not in _OF_EVERY_MODULE and (content := _content(value)) is not value
        }
        self._children = dict(module._modules)
        self._tensors = _tensors_of(module)

    def is_of(self, module: nn.Module) -> bool:
        try:
            return bool(
                self._attributes_of(module) == self._attributes
                and module._modules == self._children
                and (not self._contents or self._contents_are_of(vars(module)))
                and _tensors_of(module) == self._tensors
            )
        # Tensors and arrays in attributes are compared elementwise, unless they are the same: an answer that
        # is no truth value comes of another one.
        except (RuntimeError, TypeError, ValueError):
            return False

    def _contents_are_of(self, attributes: dict[str, Any]) -> bool:
        return all(_content(attributes[name]) == content for name, content in self._contents.items())

    def _attributes_of(self, module: nn.Module) -> dict[str, Any]:
        attributes = dict(vars(module))
        for name in _NOT_COMPARED:
            attributes.pop(name, None)
        if self._is_graph:
            # A copy of a graph module has a graph of its own, equal to no other.
            return {name: value for name, value in attributes.items() if not name.startswith("_")}
        return attributes


def _tensors_of(module: nn.Module) -> list[tuple[str, torch.Size | None]] | None:
    """The parameters and buffers of a module, by name, with their shapes."""
    if not module._parameters and not module._buffers:
        return None
    held = (*module._parameters.items(), *module._buffers.items())
    return [(name, None if tensor is None else tensor.shape) for name, tensor in held]


def _content(value: Any, depth: int = 0) -> Any:
    """A copy of a container or a plain object, down to values that are compared as they are."""
    if depth == _DEEPEST:
        return value
    if isinstance(value, dict):
        return {key: _content(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_content(one, depth + 1) for one in value]
    if isinstance(value, set):
        return set(value)
    opaque = isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value)
    if opaque or not isinstance(getattr(value, "__dict__", None), dict):
        return value
    return type(value), _content(vars(value), depth + 1)
