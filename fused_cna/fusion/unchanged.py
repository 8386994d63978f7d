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
# Tensors and arrays are compared elementwise, unless they are the same: what is no truth value then comes of
# another one.
_NO_ANSWER = (RuntimeError, TypeError, ValueError)


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
        self._modules = list(modules)
        self._kinds = list(map(type, self._modules))
        self._training = [module in live for module in self._modules]
        self._states = list(map(_State, self._modules))
        self._with_contents = [i for i, state in enumerate(self._states) if state.has_contents]
        self._entered = list(entered)
        # The same once more for a comparison of lists, which takes a quarter of the time.
        self._attributes = [
            {**vars(module), "training": training}
            for module, training in zip(self._modules, self._training, strict=True)
        ]
        self._children = [dict(module._modules) for module in self._modules]
        self._parameters = [dict(module._parameters) for module in self._modules]

    def holds(self, network: nn.Module) -> bool:
        """Whether all is as it was, without hooks inside, and in eval mode."""
        if not self._network.is_of(network):
            return False
        if not self._is_the_same() and not self._is_equal():
            return False
        # Hooks of the network itself run before and after its forward, as always.
        return not any(map(layers.has_hooks, self._entered)) and not layers.has_global_hooks()

    def _is_the_same(self) -> bool:
        """Whether everything is the object that it was; what is equal but another object may count or not."""
        modules = self._modules
        try:
            return (
                [vars(module) for module in modules] == self._attributes
                and [module._modules for module in modules] == self._children
                and [module._parameters for module in modules] == self._parameters
                and [type(module) for module in modules] == self._kinds
                and all(self._states[i].is_of(modules[i]) for i in self._with_contents)
            )
        except _NO_ANSWER:
            return False

    def _is_equal(self) -> bool:
        parts = zip(self._modules, self._kinds, self._training, self._states, strict=True)
        return all(
            type(module) is kind and module.training is training and state.is_of(module)
            for module, kind, training, state in parts
        )


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
        except _NO_ANSWER:
            return False

    @property
    def has_contents(self) -> bool:
        """Whether attributes have contents that may change while they stay the same objects."""
        return bool(self._contents)

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
