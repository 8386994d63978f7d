"""From groups to fused blocks: the graph of a network with one call for each group."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from fused_cna import eager, layers
from fused_cna._checks import explicit_padding, pair
from fused_cna.activation import ACTIVATIONS
from fused_cna.fusion.calls import Act, Norm, Pad, Value
from fused_cna.fusion.matching import Group, Matches
from fused_cna.modules import ConvNormAct
from fused_cna.ops import conv_norm_act


class FusedBlock(ConvNormAct):
    """A ConvNormAct in place of Python code, which adds whatever the code would have added."""

    group_name: str
    """The name of the convolution in the network."""

    def forward(self, x: Tensor, residual: Any = None, *, out: Tensor | None = None) -> Tensor:
        """As :class:`ConvNormAct`, but a residual of another shape or dtype broadcasts and promotes."""
        if residual is None or out is not None or self._fits(x, residual):
            return super().forward(x, residual, out=out)
        z = self.norm(self.conv(self._pad(x)))
        if self.residual_order == "act_add" or type(layers.own_activation(self.norm)) not in (
            type(None),
            nn.Identity,
        ):
            return self.act(z) + residual
        return self.act(z + residual)

    def _fits(self, x: Tensor, residual: Any) -> bool:
        """Whether the residual is what the fused call can add: the shape, dtype and device of the output."""
        if not isinstance(residual, Tensor) or residual.device != x.device:
            return False
        if residual.dtype != _dtype_of_conv(x):
            return False
        if x.dim() not in (3, 4) or residual.dim() != x.dim():
            return False
        conv = self.conv
        weight = conv.weight
        if residual.shape[-3] != weight.shape[0] or residual.shape[:-3] != x.shape[:-3]:
            return False
        size, filter_size, stride, dilation = x.shape[-2:], weight.shape[2:], conv.stride, conv.dilation
        if layers.pads_same(conv):
            return all(residual.shape[i - 2] == -(-size[i] // stride[i]) for i in range(2))
        padding = conv.padding
        if isinstance(padding, str):
            padding = explicit_padding(padding, filter_size, stride, dilation)
        around = (
            [2 * int(p) for p in padding]
            if len(padding) == 2
            else [padding[0] + padding[1], padding[2] + padding[3]]
        )
        top, bottom, left, right = self.zero_pad
        around = [around[0] + top + bottom, around[1] + left + right]
        return all(
            residual.shape[i - 2]
            == (size[i] + around[i] - dilation[i] * (filter_size[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )


def _dtype_of_conv(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of ``x`` comes."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if eager.is_autocast_enabled(device_type) else x.dtype


def block_of(group: Group, matches: Matches, name: str) -> FusedBlock | None:
    """The block for a group, sharing the network's modules; None where parts of it are no modules."""
    norm, act, pad = (matches.calls[n] if n is not None else None for n in (group.norm, group.act, group.pad))
    if group.call.module is None or (isinstance(norm, Norm) and norm.module is None):
        return None
    block = cast(
        FusedBlock,
        FusedBlock.from_modules(
            group.call.module,
            norm.module if isinstance(norm, Norm) else None,
            act_module(act) if isinstance(act, Act) else None,
            residual_order=group.residual_order,
        ),
    )
    if isinstance(pad, Pad):
        block.zero_pad = pad.amounts
    block.group_name = name
    return block.eval()


def act_module(act: Act) -> nn.Module:
    if act.module is not None:
        return act.module
    row = ACTIVATIONS[act.name]
    if act.name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return row.module(**dict(zip(row.params, act.params, strict=True)))


class Rewriter:
    """Replaces the nodes of groups, in the order of the graph, by one node each."""

    def __init__(self, graph: fx.Graph, matches: Matches) -> None:
        self.graph = graph
        self._calls = matches.calls
        self._replaced: dict[Node, Node] = {}

    def emit_block(self, group: Group, target: str) -> None:
        """One call of the module ``target`` for a group."""
        x, residual = self._operands(group)
        with self._place(group):
            made = self.graph.call_module(target, (x,) if residual is None else (x, residual))
        self._replace(group, made)

    def emit_call(self, group: Group) -> None:
        """One call of :func:`fused_cna.conv_norm_act` for a group, with its parameters as values."""
        x, residual = self._operands(group)
        call = group.call
        norm, act = (self._calls[n] if n is not None else None for n in (group.norm, group.act))
        options: dict[str, Any] = {
            "stride": pair(call.stride, "stride"),
            "padding": self._padding(group),
            "dilation": pair(call.dilation, "dilation"),
            "groups": call.groups,
        }
        with self._place(group):
            weight = self._value(call.weight, group.conv, "weight")
            bias = self._value(call.bias, group.conv, "bias")
            if isinstance(norm, Norm):
                options["eps"] = norm.eps
                options["act"], options["act_params"] = norm.act, norm.act_params
                for option, value, name in (
                    ("norm_weight", norm.weight, "weight"),
                    ("norm_bias", norm.bias, "bias"),
                    ("running_mean", norm.mean, "running_mean"),
                    ("running_var", norm.var, "running_var"),
                ):
                    options[option] = self._value(value, group.norm, name)
        if isinstance(act, Act):
            options["act"], options["act_params"] = act.name, act.params
        if residual is not None:
            options["residual"], options["residual_order"] = residual, group.residual_order
        with self._place(group):
            made = self.graph.call_function(conv_norm_act, (x, weight, bias), options)  # type: ignore[arg-type]
        self._replace(group, made)

    def _operands(self, group: Group) -> tuple[Node, Node | None]:
        pad = self._calls.get(group.pad) if group.pad is not None else None
        x = pad.x if isinstance(pad, Pad) else group.call.x
        residual = group.residual
        return self._replaced.get(x, x), None if residual is None else self._replaced.get(residual, residual)

    def _value(self, value: Value, node: Node | None, name: str) -> Node | None:
        """The node that hands in a parameter: one that reads it from its module where a module holds it."""
        return self.graph.get_attr(f"{node.target}.{name}") if isinstance(value, Tensor) and node else value  # type: ignore[return-value]

    def _padding(self, group: Group) -> Any:
        pad = self._calls.get(group.pad) if group.pad is not None else None
        if not isinstance(pad, Pad):
            return group.call.padding
        height, width = pair(group.call.padding, "padding")
        top, bottom, left, right = pad.amounts
        return top + height, bottom + height, left + width, right + width

    def _place(self, group: Group) -> AbstractContextManager[Any]:
        """Where the last operand is there: at the addition, else at the convolution."""
        return self.graph.inserting_before(group.add or group.conv)

    def _replace(self, group: Group, made: Node) -> None:
        nodes = group.nodes
        self._replaced[nodes[-1]] = made
        made.meta.update(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(made)
        for node in reversed(nodes):
            self.graph.erase_node(node)


def values_as_inputs(graph: fx.Graph) -> list[str]:
    """Turn the graph's reads of parameters and buffers into inputs, after its own; their paths in order."""
    paths: list[str] = []
    made: dict[str, Node] = {}
    first = next(iter(graph.nodes))
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        path = str(node.target)
        if path not in made:
            with graph.inserting_after(last_input):
                made[path] = last_input = graph.placeholder(f"value_{len(paths)}")
            paths.append(path)
        node.replace_all_uses_with(made[path])
        graph.erase_node(node)
    assert first.op == "placeholder"
    return paths


def keep_views_apart(graph: fx.Graph) -> None:
    """``view`` becomes ``reshape``: in another memory format of the weights a view may not exist."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"


def in_order(value: Any) -> Any:
    """A tensor with its elements in order in memory; anything else as it is."""
    return value.contiguous() if isinstance(value, Tensor) else value


def keep_layout_of(graph: fx.Graph, opaque: Collection[str]) -> None:
    """Modules whose code is not known get their inputs in the layout in which it was written to work."""
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target in opaque]:
        for source in node.all_input_nodes:
            with graph.inserting_before(node):
                node.replace_input_with(source, graph.call_function(in_order, (source,)))
