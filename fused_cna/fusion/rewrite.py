"""From groups to the overlay that runs them: the graph of a network with one call for each group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from fused_cna import activation, eager, layers
from fused_cna._checks import explicit_padding, output_shape, pair
from fused_cna.activation import ACTIVATIONS
from fused_cna.functional import conv_norm_act
from fused_cna.fusion.frozen import FrozenConv, keep_layout, reuse_memory
from fused_cna.fusion.groups import RESIDUAL_FIRST, Group, Matches
from fused_cna.fusion.guards import Guard
from fused_cna.fusion.nodes import Act, Value, batch_norm_written_out
from fused_cna.fusion.overlay import Overlay
from fused_cna.fusion.records import LayerRecord
from fused_cna.fusion.trace import Trace
from fused_cna.modules import ConvNormAct


class FusedBlock(ConvNormAct):
    """A ConvNormAct in place of Python code, which adds whatever the code would have added."""

    def _compute(self, x: Tensor, residual: Any, out: Tensor | None) -> Tensor:
        """As :class:`ConvNormAct`, but a residual of another shape or dtype broadcasts and promotes."""
        if residual is None or out is not None or self._fits(x, residual):
            return super()._compute(x, residual, out)
        z = self.norm(self.conv(self._pad(x)))
        return self.act(z + residual) if self.residual_order == "add_act" else self.act(z) + residual

    def _fits(self, x: Tensor, residual: Any) -> bool:
        """Whether the residual is what the fused call can add."""
        shape = layers.output_shape(self.conv, x.shape, self.zero_pad) if x.dim() in (3, 4) else ()
        return eager.is_summand(residual, x, shape)


def block_of(group: Group) -> FusedBlock:
    """The block for a group of modules, which shares them."""
    norm, act = group.norm_call, group.act_call
    block: Any = FusedBlock.from_modules(
        group.module,  # type: ignore[arg-type]
        nn.Identity().eval() if norm is None else norm.module,
        None if act is None else act_module(act),
        residual_order=group.residual_order,
    )
    if group.pad is not None:
        block.zero_pad = group.calls[group.pad].amounts
    # Its children are the network's, whose modes stay as they are.
    block.training = False
    return block  # type: ignore[no-any-return]


def act_module(act: Act) -> nn.Module:
    if act.module is not None:
        return act.module
    row = ACTIVATIONS[act.name]
    if act.name == "gelu_tanh":
        return nn.GELU(approximate="tanh").eval()
    return row.module(**dict(zip(row.params, act.params, strict=True))).eval()


def call_by_values(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str = "", residual: Any = None, **options: Any
) -> Tensor:
    """A call of ``conv_norm_act``, or one operation after another where functions make something else.

    A residual of another shape or dtype broadcasts and promotes; a functional norm takes rows for channels
    where ``x`` is one image, and promotes dtypes where it is written out.
    """
    names = ("running_mean", "running_var", "norm_weight", "norm_bias")
    vectors = [options.get(name) for name in names]
    fits = not norm or (
        x.dim() == 4
        and not eager.is_autocast_enabled(x.device.type)
        and all(one is None or one.dtype == x.dtype for one in vectors)
    )
    of_conv = {name: options[name] for name in ("stride", "padding", "dilation", "groups")}
    if fits and residual is not None:
        stride, padding, dilation, _ = of_conv.values()
        padding = explicit_padding(padding, weight.shape[2:], stride, dilation)
        shape = output_shape(x.shape, weight.shape, stride, padding, dilation)
        fits = eager.is_summand(residual, x, shape)
    if fits:
        return conv_norm_act(x, weight, bias, residual=residual, **options)
    z = conv_norm_act(x, weight, bias, **of_conv)
    if vectors[0] is not None:
        compute: Any = batch_norm_written_out if norm == "written out" else F.batch_norm
        z = compute(z, *vectors, False, 0.1, options["eps"])
    order = options.get("residual_order")
    z = z + residual if order == "add_act" else z
    z = activation.apply(z, options.get("act", "identity"), options.get("act_params", ()))
    return z + residual if order == "act_add" else z


class Rewriter:
    """Replaces the nodes of groups, in the order of the graph, by one node each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.replaced: dict[Node, Node] = {}

    def emit_block(self, group: Group, target: str) -> Node:
        """One call of the module ``target`` for a group."""
        made = self._emit(group, lambda *operands: self.graph.call_module(target, operands))
        # The first of two summands decides in which layout the sum lies.
        made.meta[RESIDUAL_FIRST] = group.add is not None and group.calls[group.add].a is group.residual
        return made

    def emit_call(self, group: Group, target: Callable[..., Any] = conv_norm_act) -> Node:
        """One call of :func:`fused_cna.conv_norm_act` for a group, with its parameters as values."""
        call, norm, act = group.call, group.norm_call, group.act_call

        def value_of(value: Value, node: Any, name: str) -> Any:
            # A parameter that a module holds is read from it.
            return self.graph.get_attr(f"{node.target}.{name}") if isinstance(value, Tensor) else value

        def make(x: Node, *residual: Node) -> Node:
            parameters = [value_of(getattr(call, name), group.conv, name) for name in ("weight", "bias")]
            options: dict[str, Any] = {"stride": pair(call.stride, "stride"), "padding": call.padding}
            options |= {"dilation": pair(call.dilation, "dilation"), "groups": call.groups}
            if group.pad is not None:
                height, width = pair(call.padding, "padding")
                top, bottom, left, right = group.calls[group.pad].amounts
                options["padding"] = (top + height, bottom + height, left + width, right + width)
            if norm is not None:
                options |= {"eps": norm.eps, "act": norm.act, "act_params": norm.act_params}
                for option, name in layers.NORM_TENSORS.items():
                    value = getattr(norm, name.removeprefix("running_"))
                    options[option] = value_of(value, group.norm, name)
                if target is call_by_values and norm.module is None:
                    is_written_out = group.norm.target is batch_norm_written_out  # type: ignore[union-attr]
                    options["norm"] = "written out" if is_written_out else "function"
            if act is not None:
                options |= {"act": act.name, "act_params": act.params}
            if residual:
                options |= {"residual": residual[0], "residual_order": group.residual_order}
            return self.graph.call_function(target, (x, *parameters), options)

        return self._emit(group, make)

    def _emit(self, group: Group, make: Callable[..., Node]) -> Node:
        """The node that ``make`` makes of x and the residual, in place of a group's."""
        first = group.calls[group.pad or group.conv].x
        operands = [first] if group.residual is None else [first, group.residual]
        # Where the last operand is there: at the addition, else at the convolution.
        with self.graph.inserting_before(group.add or group.conv):
            made = make(*(self.replaced.get(node, node) for node in operands))
        nodes = group.nodes
        self.replaced[nodes[-1]] = made
        made.meta.update(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(made)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        return made


def build_overlay(
    network: nn.Module, traced: Trace, matches: Matches, layers: list[LayerRecord], *, freeze: bool
) -> Overlay:
    """The overlay of a network, whose graph is used up.

    Args:
        layers: what becomes of the convolutions.
        freeze: make :class:`FrozenConv` blocks, also of convolutions that nothing is fused with.
    """
    graph, modules = traced.graph, dict(traced.modules)
    # A snapshot's results lie in channels_last inside the graph, so that code may not ask how they lie.
    asks = any(node.target in _READS_LAYOUT for node in graph.nodes) or matches.aliasing.depends_on_layout()
    freeze = freeze and not asks
    plain, copies = fx.Graph(), dict[Node, Node]()
    plain.output(plain.graph_copy(graph, copies))
    rewriter = Rewriter(graph)
    blocks: dict[tuple[Any, ...], str] = {}
    snapshots: list[nn.Module] = []
    for group in matches.groups:
        if not group.is_fused and not (freeze and group.module is not None):
            continue
        if not group.is_of_modules:
            # Parts of it are modules that are not called any more, so hooks on them have to be looked for.
            traced.entered += [modules[str(node.target)] for node in group.nodes if node.op == "call_module"]
            rewriter.emit_call(group, call_by_values)
            continue
        block = block_of(group)
        norm = id(block.norm) if group.norm is not None else None
        key = (id(block.conv), norm, str(block.act), block.residual_order, block.zero_pad)
        if key not in blocks:
            blocks[key] = f"blocks.{len(blocks)}"
            snapshots += [block.conv, block.norm, block.act] if freeze else []
            modules[blocks[key]] = FrozenConv(block) if freeze else block
            # By this name verification speaks of it.
            modules[blocks[key]].group_name = str(group.conv.target)  # type: ignore[assignment]
        rewriter.emit_block(group, blocks[key])
    values = values_as_inputs(graph)
    for node in graph.find_nodes(op="call_method", target="view") if freeze else ():
        # In channels_last a view may not exist.
        node.target = "reshape"
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    fused = fx.GraphModule({name: module for name, module in modules.items() if name in called}, graph)
    if freeze:
        keep_layout(fused)
        reuse_memory(fused)
    # Else graph and module refer to each other, and the weights stay until the garbage collector comes by.
    fused.graph.owning_module = None
    leaves = {name: module for name, module in traced.modules.items() if name in called}
    stand_ins = {made: last for last, made in rewriter.replaced.items()}
    twins = {node: copies.get(stand_ins.get(node, node)) for node in fused.graph.nodes}
    return Overlay(
        fused,
        values,
        Guard(network, traced, snapshots),
        layers,
        leaves,
        is_idle=not rewriter.replaced,
        plain=plain,
        pairs={node: twin for node, twin in twins.items() if twin is not None},
    )


# What tells how a tensor lies in memory.
_READS_LAYOUT = {"as_strided", "stride", "is_contiguous", "data_ptr", torch.as_strided}


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
