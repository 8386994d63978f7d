"""From groups to the overlay that runs them: the graph of a network with one call for each group."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from fused_cna import activation, eager, layers
from fused_cna._checks import explicit_padding, output_size, pair
from fused_cna.activation import ACTIVATIONS
from fused_cna.fusion.frozen import FrozenConv, keep_layout, reuse_memory
from fused_cna.fusion.groups import RESIDUAL_FIRST, Group, Matches
from fused_cna.fusion.guards import Guard
from fused_cna.fusion.nodes import Act, Add, Norm, Pad, Value, batch_norm_written_out
from fused_cna.fusion.overlay import Overlay
from fused_cna.fusion.records import LayerRecord
from fused_cna.fusion.trace import Trace
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
        """Whether the residual is what the fused call can add."""
        shape = layers.output_shape(self.conv, x.shape, self.zero_pad) if x.dim() in (3, 4) else ()
        return eager.is_summand(residual, x, shape)


def block_of(group: Group, matches: Matches) -> FusedBlock | None:
    """The block for a group, sharing the network's modules; None where parts of it are no modules."""
    norm, act, pad = (matches.calls[n] if n is not None else None for n in (group.norm, group.act, group.pad))
    if group.call.module is None or (isinstance(norm, Norm) and norm.module is None):
        return None
    block = cast(
        FusedBlock,
        FusedBlock.from_modules(
            group.call.module,
            norm.module if isinstance(norm, Norm) else nn.Identity().eval(),
            act_module(act) if isinstance(act, Act) else None,
            residual_order=group.residual_order,
        ),
    )
    if isinstance(pad, Pad):
        block.zero_pad = pad.amounts
    # Its children are the network's, whose modes stay as they are.
    block.training = False
    return block


def act_module(act: Act) -> nn.Module:
    if act.module is not None:
        return act.module
    row = ACTIVATIONS[act.name]
    if act.name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return row.module(**dict(zip(row.params, act.params, strict=True)))


def call_by_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    is_written_out: bool = False,
    residual: Any = None,
    **options: Any,
) -> Tensor:
    """A call of ``conv_norm_act``, or one operation after another where functions make something else.

    A residual of another shape or dtype broadcasts and promotes; a functional norm takes rows for channels
    where ``x`` is one image, and promotes dtypes where it is written out.
    """
    mean, order = options.get("running_mean"), options.pop("residual_order", "add_act")
    fits = mean is None or (
        x.dim() == 4
        and mean.dtype == x.dtype == weight.dtype
        and not eager.is_autocast_enabled(x.device.type)
    )
    if fits and residual is not None:
        stride, dilation = options["stride"], options["dilation"]
        padding = explicit_padding(options["padding"], weight.shape[2:], stride, dilation)
        size = output_size(x.shape[-2:], weight.shape[2:], stride, padding, dilation)
        fits = eager.is_summand(residual, x, (*x.shape[:-3], weight.shape[0], *size))
    if fits:
        return conv_norm_act(x, weight, bias, residual=residual, residual_order=order, **options)
    act, act_params, eps = (
        options.pop("act", "identity"),
        options.pop("act_params", ()),
        options.pop("eps", 0.0),
    )
    vectors = [
        options.pop(name, None) for name in ("running_mean", "running_var", "norm_weight", "norm_bias")
    ]
    z = conv_norm_act(x, weight, bias, **options)
    if mean is not None:
        norm: Any = batch_norm_written_out if is_written_out else F.batch_norm
        z = norm(z, *vectors, False, 0.1, eps)
    if residual is not None and order == "add_act":
        z = z + residual
    z = activation.apply(z, act, act_params)
    return z + residual if residual is not None and order == "act_add" else z


class Rewriter:
    """Replaces the nodes of groups, in the order of the graph, by one node each."""

    def __init__(self, graph: fx.Graph, matches: Matches) -> None:
        self.graph = graph
        self._calls = matches.calls
        self.replaced: dict[Node, Node] = {}

    def emit_block(self, group: Group, target: str) -> None:
        """One call of the module ``target`` for a group."""
        x, residual = self._operands(group)
        with self._place(group):
            made = self.graph.call_module(target, (x,) if residual is None else (x, residual))
        add = self._calls.get(group.add) if group.add is not None else None
        # The first of two summands decides in which layout the sum lies.
        made.meta[RESIDUAL_FIRST] = isinstance(add, Add) and add.a is group.residual
        self._replace(group, made)

    def emit_call(self, group: Group, target: Callable[..., Any] = conv_norm_act) -> Node:
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
                options |= {"eps": norm.eps, "act": norm.act, "act_params": norm.act_params}
                for option, value, name in (
                    ("norm_weight", norm.weight, "weight"),
                    ("norm_bias", norm.bias, "bias"),
                    ("running_mean", norm.mean, "running_mean"),
                    ("running_var", norm.var, "running_var"),
                ):
                    options[option] = self._value(value, group.norm, name)
            if isinstance(act, Act):
                options |= {"act": act.name, "act_params": act.params}
            if group.norm is not None and group.norm.target is batch_norm_written_out:
                options["is_written_out"] = True
            if residual is not None:
                options |= {"residual": residual, "residual_order": group.residual_order}
            made = self.graph.call_function(target, (x, weight, bias), options)
        self._replace(group, made)
        return made

    def _operands(self, group: Group) -> tuple[Node, Node | None]:
        pad = self._calls.get(group.pad) if group.pad is not None else None
        x = pad.x if isinstance(pad, Pad) else group.call.x
        residual = group.residual
        return self.replaced.get(x, x), None if residual is None else self.replaced.get(residual, residual)

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
        self.replaced[nodes[-1]] = made
        made.meta.update(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(made)
        for node in reversed(nodes):
            self.graph.erase_node(node)


def build_overlay(
    network: nn.Module,
    traced: Trace,
    matches: Matches,
    layers: list[LayerRecord],
    *,
    freeze: bool,
    keep: bool,
) -> Overlay:
    """The overlay of a network, whose graph is used up.

    Args:
        layers: what becomes of the convolutions.
        freeze: make :class:`FrozenConv` blocks, also of convolutions that nothing is fused with.
        keep: keep the graph as it was traced, to be verified.
    """
    # A snapshot's results lie in channels_last inside the graph.
    freeze = freeze and not (_reads_layout(traced) or matches.aliasing.depends_on_layout())
    plain = fx.Graph()
    copies: dict[Node, Node] = {}
    if keep:
        plain.output(plain.graph_copy(traced.graph, copies))
    rewriter = Rewriter(traced.graph, matches)
    blocks: dict[tuple[Any, ...], str] = {}
    modules = dict(traced.modules)
    snapshots: list[nn.Module] = []
    for group in matches.groups:
        if not group.is_fused and not (freeze and group.call.module is not None):
            continue
        block = block_of(group, matches)
        if block is None:
            # Parts of it are modules that are not called any more, so hooks on them have to be looked for.
            traced.entered += [modules[str(node.target)] for node in group.nodes if node.op == "call_module"]
            rewriter.emit_call(group, call_by_values)
            continue
        key = (
            id(block.conv),
            group.norm and id(block.norm),
            str(block.act),
            block.residual_order,
            block.zero_pad,
        )
        if key not in blocks:
            blocks[key] = f"blocks.{len(blocks)}"
            if freeze:
                snapshots += [block.conv, block.norm, block.act]
            modules[blocks[key]] = FrozenConv(block) if freeze else block
            modules[blocks[key]].group_name = str(group.conv.target)  # type: ignore[assignment]
        rewriter.emit_block(group, blocks[key])
    values = values_as_inputs(traced.graph)
    for node in traced.graph.find_nodes(op="call_method", target="view") if freeze else ():
        # In channels_last a view may not exist.
        node.target = "reshape"
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    graph = fx.GraphModule({name: module for name, module in modules.items() if name in called}, traced.graph)
    if freeze:
        keep_layout(graph)
        reuse_memory(graph)
    # Else graph and module refer to each other, and the weights stay until the garbage collector comes by.
    graph.graph.owning_module = None
    leaves = {name: module for name, module in traced.modules.items() if name in called}
    overlay = Overlay(graph, values, Guard(network, traced, snapshots), layers, leaves)
    if keep:
        overlay.plain = plain
        stand_ins = {made: last for last, made in rewriter.replaced.items()}
        overlay.pairs = {
            node: copies[stand_ins.get(node, node)]
            for node in graph.graph.nodes
            if stand_ins.get(node, node) in copies
        }
    return overlay


# What tells how a tensor lies in memory.
_READS_LAYOUT = {"as_strided", "stride", "is_contiguous", "data_ptr", torch.as_strided}


def _reads_layout(traced: Trace) -> bool:
    """Whether the code may compute something else where results come in another memory format."""
    return any(node.target in _READS_LAYOUT for node in traced.graph.nodes)


def values_as_inputs(graph: fx.Graph) -> list[str]:
    """Turn the graph's reads of parameters and buffers into inputs, after its own; their paths in order."""
    made: dict[str, Node] = {}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        path = str(node.target)
        if path not in made:
            with graph.inserting_after(last_input):
                made[path] = last_input = graph.placeholder(f"value_{len(made)}")
        node.replace_all_uses_with(made[path])
        graph.erase_node(node)
    return list(made)
