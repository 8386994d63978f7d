"""Which nodes of a graph may share memory, and which overwrite it: what may be computed later."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from fused_cna import layers
from fused_cna.fusion.nodes import Act, Add, Call, Conv, Norm, Pad

# Functions, methods and modules that make fresh memory: those whose results lie as their inputs do, and all.
KEEPING_LAYOUT = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, "mul"}
KEEPING_LAYOUT |= {torch.cat, F.interpolate, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d}
KEEPING_LAYOUT |= {torch.mean, "mean", nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Upsample}
_FRESH = KEEPING_LAYOUT | {torch.stack, torch.matmul, operator.matmul, F.conv2d, F.conv_transpose2d}
_FRESH |= {F.batch_norm, F.group_norm, F.layer_norm, F.linear, F.softmax}
_FRESH |= {nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.Softmax}
_FRESH |= {F.scaled_dot_product_attention}
_LAYOUT_DECIDES = {"contiguous", "reshape", "view", "flatten", "to", torch.reshape, torch.flatten}
_INPLACE_NAMES = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem"
_INPLACE_OPERATORS = {getattr(operator, name) for name in _INPLACE_NAMES.split()}


class Aliasing:
    """May-share-memory and may-overwrite of a graph's nodes, erring on the careful side."""

    def __init__(self, graph: Graph, calls: dict[Node, Call], modules: dict[str, nn.Module]) -> None:
        self._calls, self._modules = calls, modules
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._root: dict[Node, Node] = {}
        self._mutations: list[tuple[Node, Node]] = []
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in graph.nodes:
            self._root[node] = node
            sources, overwritten = self._memory(node)
            # The caller may hand in views of one tensor.
            for source in inputs[:1] if node.op == "placeholder" else sources:
                self._root[self._find(source)] = self._find(node)
            self._mutations += [(node, one) for one in overwritten]

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
        for node, one in self._mutations:
            if self._order[first] < self._order[node] < self._order[last] and self.may_alias(value, one):
                return node
        return None

    def overwrites_values(self) -> bool:
        """Whether a parameter or buffer is overwritten, which modules may read at any time."""
        return self._overwrites(lambda node: node.op == "get_attr")

    def depends_on_layout(self) -> bool:
        """Whether something is overwritten that shares memory with something else in some layouts only."""
        return self._overwrites(lambda node: node.target in _LAYOUT_DECIDES)

    def _overwrites(self, is_meant: Callable[[Node], bool]) -> bool:
        meant = [node for node in self._order if is_meant(node)]
        return any(self.may_alias(node, one) for _, one in self._mutations for node in meant)

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

    def _memory(self, node: Node) -> tuple[list[Node], list[Node]]:
        """The inputs whose memory the result may be in, and those whose memory the node may overwrite."""
        call, inputs = self._calls.get(node), node.all_input_nodes
        overwritten = getattr(call, "overwritten", None)
        if node.op == "call_function" and node.target in _INPLACE_OPERATORS and node.args:
            overwritten = node.args[0]
        if isinstance(overwritten, Node):
            return [overwritten], [overwritten]
        if isinstance(call, (Conv, Norm, Act, Add, Pad)):
            return inputs if isinstance(call, Pad) and not any(call.amounts) else [], []
        if node.op in ("placeholder", "get_attr", "output"):
            return inputs, []
        what: Any = node.target
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            what = type(module)
            is_known = what.__module__.startswith("torch.nn") and not layers.has_hooks(module)
            may_overwrite = not is_known or getattr(module, "inplace", False)
        else:
            is_known, may_overwrite = "out" not in node.kwargs, _may_overwrite(node)
        return [] if is_known and what in _FRESH else inputs, inputs if may_overwrite else []


def _may_overwrite(node: Node) -> bool:
    """Whether a function or method may overwrite an input."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    is_flagged = any(
        node.kwargs.get(flag, False) is not False for flag in ("inplace", "training", "use_input_stats")
    )
    if is_flagged or "out" in node.kwargs or (name.endswith("_") and not name.endswith("__")):
        return True
    module = getattr(target, "__module__", None) or ""
    known = ("torch", "_operator", "operator", "math", "builtins", "collections")
    is_known = module.startswith(known) and not isinstance(target, HigherOrderOperator)
    return node.op == "call_function" and (not is_known or any(argument is True for argument in node.args))
