"""Whether a network still is what it was when it was traced: what its code can read besides tensors."""

import operator
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from fused_cna import layers
from fused_cna.fusion.records import OVERLAYS
from fused_cna.fusion.trace import Trace

# What fusing itself and a compiler add to a module.
_NOT_COMPARED = {OVERLAYS, "_compiled_call_impl", "_is_torch_compile", *vars(nn.Module())}
_DEEPEST = 4
# Tensors and arrays are compared elementwise, unless they are the same, and that is not true or false.
_NO_ANSWER = (RuntimeError, TypeError, ValueError, AttributeError)


class Guard:
    """The classes, modes, children and tensors of the modules whose code a graph stands for.

    Of attributes, those that the code may read are compared by value, with what is in containers and plain
    objects. Parameters and buffers are compared by whether they are there, and their shapes. Everything is in
    lists, which compare in a fraction of the time that a loop takes.

    Args:
        network: what was traced. It is not kept, so that nothing refers in a circle.
        snapshots: modules that were folded into a snapshot: all of them is compared, and whether their
            tensors were exchanged or written to.
    """

    def __init__(self, network: nn.Module, traced: Trace, snapshots: Iterable[nn.Module] = ()) -> None:
        self._reads = traced.reads
        self._folded = list(dict.fromkeys(part for module in snapshots for part in module.modules()))
        self._folded_kinds = [*map(type, self._folded)]
        self._states = [[dict(one) for one in _state(module)] for module in self._folded]
        tensors = (t for m in self._folded for t in (*m._parameters.values(), *m._buffers.values()))
        self._tensors = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
        self._versions = _versions(self._tensors)
        leaves = {part for leaf in traced.modules.values() for part in leaf.modules()}
        parts = list(dict.fromkeys((*network.modules(), *traced.entered)))
        self._modules = [m for m in parts[1:] if m not in leaves or m in traced.entered]
        code = [network, *self._modules]
        self._training = [module.training for module in self._modules]
        self._kinds = [*map(type, self._modules)]
        self._children = [dict(module._modules) for module in code]
        self._keys = [set(vars(module)) for module in code]
        self._names = [self._names_of(module) for module in code]
        self._held = [(i, held) for i, module in enumerate(code) if (held := _tensors_of(module))]
        self._values = [
            (None if module is network else module, name, vars(module)[name], _content(vars(module)[name]))
            for module in parts
            for name in self._names_of(module)
        ]
        # A module that is called runs its own hooks, as those of the network itself run around its forward.
        self._own = list(dict.fromkeys((*traced.entered, *self._folded)))

    def holds(self, network: nn.Module) -> bool:
        """Whether all is as it was, without hooks inside, and in eval mode."""
        try:
            return (
                not layers.has_global_hooks()
                and [module.training for module in self._modules] == self._training
                and [*map(type, self._modules)] == self._kinds
                and [module._modules for module in (network, *self._modules)] == self._children
                and _versions(self._tensors) == self._versions
                and [*map(type, self._folded)] == self._folded_kinds
                and [_state(module) for module in self._folded] == self._states
                and not any(map(layers.has_hooks, self._own))
                and "forward" not in vars(network)
                and self._has_the_same_attributes(network)
            )
        except _NO_ANSWER:
            return False

    def _has_the_same_attributes(self, network: nn.Module) -> bool:
        code = [network, *self._modules]
        keys: list[Any] = [vars(module).keys() for module in code]
        if keys != self._keys and [*map(self._names_of, code)] != self._names:
            return False
        for module, name, value, content in self._values:
            now = vars(network if module is None else module)[name]
            if (now is not value and now != value) or (content is not value and _content(now) != content):
                return False
        return all(_tensors_of(code[i]) == held for i, held in self._held)

    def _names_of(self, module: nn.Module) -> set[str]:
        """The attributes of a module that count."""
        names = vars(module).keys() - _NOT_COMPARED
        if isinstance(module, torch.fx.GraphModule):
            # A copy of a graph module has a graph of its own, equal to no other.
            names = {name for name in names if not name.startswith("_")}
        return names if self._reads is None else names & self._reads


class MemoryGuard:
    """The modules that a CUDA graph has run, as they were, and the tensors that it reads, where they lay.

    What is written into a tensor is seen by the graph itself. The memory is kept, so that nobody else's
    tensor can lie there. All comparisons are of whole lists, because they are made at every call.

    Args:
        modules: all of each is compared; none of them has hooks.
        values: tensors besides theirs.
    """

    def __init__(self, modules: Sequence[nn.Module], values: Sequence[torch.Tensor]) -> None:
        self._modules = list(modules)
        self._kinds = [*map(type, modules)]
        self._attributes = [dict(vars(module)) for module in modules]
        self._holders: list[dict[str, Any]] = [
            held for m in modules for held in (m._parameters, m._buffers, m._modules) if held
        ]
        self._held = [*chain.from_iterable(map(dict.values, self._holders))]
        self._hooks = [vars(module)[name] for module in modules for name in layers.HOOKS]
        self._values = list(values)
        self.tensors = [one for one in (*self._held, *values) if isinstance(one, torch.Tensor)]
        self._addresses = [*map(torch.Tensor.data_ptr, self.tensors)]
        # Tensors of one dimension can hardly lie otherwise at the same address.
        self._matrices = [tensor for tensor in self.tensors if tensor.dim() > 1]
        self._strides = [*map(torch.Tensor.stride, self._matrices)]
        self._memory = [tensor.detach() for tensor in self.tensors]

    def holds(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether all is as it was, and ``values`` are the same tensors."""
        try:
            return (
                [*map(type, self._modules)] == self._kinds
                and [*map(vars, self._modules)] == self._attributes
                and not any(self._hooks)
                and _same_objects([*chain.from_iterable(map(dict.values, self._holders))], self._held)
                and _same_objects(values, self._values)
                and [*map(torch.Tensor.data_ptr, self.tensors)] == self._addresses
                and [*map(torch.Tensor.stride, self._matrices)] == self._strides
            )
        except _NO_ANSWER:
            return False


def _same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _state(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module), module._parameters, module._buffers, module._modules]


def _versions(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Where tensors lie, and how often each was written to, as far as PyTorch counts it."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _tensors_of(module: nn.Module) -> list[tuple[str, torch.Size | None]]:
    """The parameters and buffers of a module, by name, with their shapes."""
    if not module._parameters and not module._buffers:
        return []
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
