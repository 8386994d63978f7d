"""Whether a network still is what it was when it was traced: what its code can read besides tensors."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fused_cna import layers
from fused_cna.fusion.trace import Trace

# What fusing itself and a compiler add to a module.
_NOT_COMPARED = {"fused_cna_overlay", "_compiled_call_impl", "_is_torch_compile", *vars(nn.Module())}
_DEEPEST = 4
# Tensors and arrays are compared elementwise, unless they are the same, and that is not true or false.
_NO_ANSWER = (RuntimeError, TypeError, ValueError)


class Guard:
    """The classes, modes, children and tensors of the modules whose code a graph stands for.

    Of attributes, those that the code may read are compared by value, with what is in containers and plain
    objects. Parameters and buffers are compared by whether they are there, and their shapes.

    Args:
        network: what was traced. It is not kept, so that nothing refers in a circle.
        snapshots: modules that were folded into a snapshot: all of them is compared, and the versions of
            their tensors.
    """

    def __init__(self, network: nn.Module, traced: Trace, snapshots: Iterable[nn.Module] = ()) -> None:
        self._reads = traced.reads
        self._snapshots = [(module, _versions(module)) for module in snapshots]
        # Kept, as the identity of one that is gone may be that of another.
        self._kept = [[*module.parameters(), *module.buffers()] for module, _ in self._snapshots]
        folded = {part for module, _ in self._snapshots for part in module.modules()}
        called = (
            {part for leaf in traced.modules.values() for part in leaf.modules()} - {*traced.entered} - folded
        )
        self._entered = [*dict.fromkeys((*traced.entered, *folded))]
        parts = dict.fromkeys((*network.modules(), *traced.entered))
        self._modules = [m for m in parts if m not in called and m is not network]
        self._kinds = [*map(type, self._modules)]
        self._training = [module.training for module in self._modules]
        self._children = [dict(module._modules) for module in self._modules]
        self._own_children = dict(network._modules)
        self._tensors = [(i, _tensors(m)) for i, m in enumerate((network, *self._modules)) if _tensors(m)]
        self._keys = [self._names(module, whole=module in folded) for module in self._modules]
        self._own_keys = self._names(network, whole=False)
        self._values = [
            (m if m is not network else None, name, value, _content(value))
            for m in parts
            for name, value in vars(m).items()
            if name in self._names(m, whole=m in folded)
        ]
        self._whole = [module in folded for module in self._modules]

    def holds(self, network: nn.Module) -> bool:
        """Whether all is as it was, without hooks inside, and in eval mode."""
        modules = self._modules
        try:
            return (
                [module.training for module in modules] == self._training
                and [*map(type, modules)] == self._kinds
                and [module._modules for module in modules] == self._children
                and network._modules == self._own_children
                and self._has_the_same_attributes(network)
                and all(_tensors(network if i == 0 else modules[i - 1]) == held for i, held in self._tensors)
                and all(_versions(module) == versions for module, versions in self._snapshots)
                # Hooks of the network itself run before and after its forward, as always.
                and not any(map(layers.has_hooks, self._entered))
                and not layers.has_global_hooks()
                and "forward" not in network.__dict__
            )
        except _NO_ANSWER:
            return False

    def _has_the_same_attributes(self, network: nn.Module) -> bool:
        for module, name, value, content in self._values:
            attributes = vars(network if module is None else module)
            now = attributes.get(name, _NO_ANSWER)
            if now is not value and now != value:
                return False
            if content is not value and _content(now) != content:
                return False
        parts = zip(self._modules, self._keys, self._whole, strict=True)
        return self._names(network, False) == self._own_keys and all(
            self._names(module, whole) == keys for module, keys, whole in parts
        )

    def _names(self, module: nn.Module, whole: bool) -> set[str]:
        """The attributes of a module that count."""
        names = vars(module).keys() - _NOT_COMPARED
        if isinstance(module, torch.fx.GraphModule):
            # A copy of a graph module has a graph of its own, equal to no other.
            names = {name for name in names if not name.startswith("_")}
        return names if whole or self._reads is None else names & self._reads


def _tensors(module: nn.Module) -> list[tuple[str, torch.Size | None]]:
    """The parameters and buffers of a module, by name, with their shapes."""
    if not module._parameters and not module._buffers:
        return []
    held = (*module._parameters.items(), *module._buffers.items())
    return [(name, None if tensor is None else tensor.shape) for name, tensor in held]


def _versions(module: nn.Module) -> list[tuple[int, int, int]]:
    """Which tensors a module holds, where, and how often each was written to, as far as PyTorch counts it."""
    parts = module.modules()
    held = (tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values()))
    return [
        (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in held
        if tensor is not None
    ]


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
