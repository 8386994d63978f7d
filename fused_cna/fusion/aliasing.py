"""Which nodes of a graph may share memory, and which overwrite it: what may be computed later."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from fused_cna import layers
from fused_cna.fusion.nodes import Act, Add, Call, Conv, Norm, Pad, Refused

_FRESH_FUNCTIONS = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.add,
    torch.mul,
    torch.cat,
    torch.stack,
    torch.matmul,
    torch.mean,
    torch.conv2d,
    torch.conv_transpose2d,
    F.batch_norm,
    F.conv2d,
    F.conv_transpose2d,
    F.group_norm,
    F.linear,
    F.interpolate,
    F.softmax,
    F.layer_norm,
    F.scaled_dot_product_attention,
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.max_pool2d,
}
_FRESH_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.ConvTranspose2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    nn.MaxPool2d,
    nn.Softmax,
    nn.Upsample,
)
_LAYOUT_DECIDES = {"contiguous", "reshape", "view", "flatten", "to", torch.reshape, torch.flatten}
_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "setitem"),
    )
}

# Keywords that make a function overwrite its input or running statistics.
_OVERWRITING_FLAGS = ("inplace", "training", "use_input_stats")


class Aliasing:
    """May-share-memory and may-overwrite of a graph's nodes, erring on the careful side."""

    def __init__(self, graph: Graph, calls: dict[Node, Call], modules: dict[str, nn.Module]) -> None:
        self._calls = calls
        self._modules = modules
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._root: dict[Node, Node] = {}
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in graph.nodes:
            self._root[node] = node
            for source in self._sources_of_memory(node):
                self._root[self._find(source)] = self._find(node)
        for node in inputs:
            # The caller may hand in views of one tensor.
            self._root[self._find(node)] = self._find(inputs[0])
        self._mutations = [(node, self._overwritten(node)) for node in graph.nodes]
        self._mutations = [(node, roots) for node, roots in self._mutations if roots]

    def _find(self, node: Node) -> Node:
        while self._root[node] is not node:
            self._root[node] = self._root[self._root[node]]
            node = self._root[node]
        return node

    def may_alias(self, a: Node, b: Node) -> bool:
        """Whether the tensors of two nodes may share memory."""
        return self._find(a) is self._find(b)

    def changed_between(self, value: Node, first: Node, last: Node) -> Node | None:
        """A node after ``first`` and before ``last`` that may overwrite ``value``; None if there is none."""
        for node, overwritten in self._mutations:
            if self._order[first] < self._order[node] < self._order[last] and any(
                self.may_alias(value, one) for one in overwritten
            ):
                return node
        return None

    def overwrites_values(self) -> bool:
        """Whether a parameter or buffer is overwritten, which modules may read at any time."""
        held = [node for node in self._order if node.op == "get_attr"]
        return any(
            self.may_alias(node, one)
            for _, overwritten in self._mutations
            for one in overwritten
            for node in held
        )

    def depends_on_layout(self) -> bool:
        """Whether something is overwritten that shares memory with something else in some layouts only."""
        return any(
            self.may_alias(node, one)
            for _, overwritten in self._mutations
            for one in overwritten
            for node in self._order
            if node.target in _LAYOUT_DECIDES
        )

    def is_forgotten(self, value: Node, last: Node) -> bool:
        """Whether nobody but ``last``, nor the caller, can read the memory of ``value`` once it runs."""
        result = {last}
        for node, index in self._order.items():
            if node is last or not self.may_alias(node, value):
                continue
            if node.op in ("placeholder", "get_attr", "output"):
                return False
            if index > self._order[last]:
                # What comes of the sum itself shares its memory, which is where the result is expected.
                if not set(node.all_input_nodes) & result:
                    return False
                result.add(node)
            elif any(self._order[user] > self._order[last] for user in node.users):
                return False
        return True

    def _sources_of_memory(self, node: Node) -> list[Node]:
        """The inputs whose memory the result may be in."""
        call = self._calls.get(node)
        if self._makes_fresh_memory(node):
            return []
        if isinstance(call, Add) and call.overwritten is not None:
            return [call.overwritten]
        return _overwritten_in_place(node) or node.all_input_nodes

    def _makes_fresh_memory(self, node: Node) -> bool:
        call = self._calls.get(node)
        if isinstance(call, Act):
            return not call.overwrites
        if isinstance(call, Add):
            return call.overwritten is None
        if isinstance(call, (Conv, Norm)):
            return True
        if isinstance(call, Pad):
            return any(call.amounts)
        if node.op == "call_function":
            return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs
        if node.op == "call_module":
            return type(self._modules[str(node.target)]) in _FRESH_MODULES
        return node.op in ("placeholder", "get_attr")

    def _overwritten(self, node: Node) -> list[Node]:
        """The inputs whose memory the node may overwrite."""
        call = self._calls.get(node)
        inputs = node.all_input_nodes
        if isinstance(call, Act):
            return [call.x] if call.overwrites else []
        if isinstance(call, Add):
            return [] if call.overwritten is None else [call.overwritten]
        if (call is not None and not isinstance(call, Refused)) or node.op in (
            "placeholder",
            "get_attr",
            "output",
        ):
            return []
        if node.op == "call_module":
            return [] if _leaves_inputs_alone(self._modules[str(node.target)]) else inputs
        if node.op == "call_method":
            name = str(node.target)
            return inputs if name.endswith("_") and not name.endswith("__") else []
        return _overwritten_in_place(node) or (inputs if _may_overwrite(node) else [])


def _overwritten_in_place(node: Node) -> list[Node]:
    """The one input that an in-place operator overwrites and returns; none for everything else."""
    target = node.args[0] if node.args and node.target in _INPLACE_OPERATORS else None
    return [target] if isinstance(target, Node) else []


def _leaves_inputs_alone(module: nn.Module) -> bool:
    of_torch = type(module).__module__.startswith("torch.nn") and not layers.has_hooks(module)
    return of_torch and not getattr(module, "inplace", False)


def _may_overwrite(node: Node) -> bool:
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if "out" in node.kwargs:
        return True
    if any(node.kwargs.get(flag, False) is not False for flag in _OVERWRITING_FLAGS):
        return True
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if name.endswith("_") and not name.endswith("__"):
        return True
    known = module.startswith(("torch", "_operator", "operator", "math", "builtins", "collections"))
    return not known or any(argument is True for argument in node.args)
