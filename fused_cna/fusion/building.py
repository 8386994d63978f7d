"""From a traced network and its groups to the overlay that runs them."""

from typing import Any

import torch
from torch import fx, nn

from fused_cna.fusion.calls import kind_of
from fused_cna.fusion.cpu_memory import reuse_memory
from fused_cna.fusion.frozen import FrozenConv
from fused_cna.fusion.matching import Group, Matches
from fused_cna.fusion.overlay import Overlay
from fused_cna.fusion.rewriting import Rewriter, block_of, keep_layout_of, keep_views_apart, values_as_inputs
from fused_cna.fusion.symbolic import Trace
from fused_cna.fusion.unchanged import AsTraced

# What tells how a tensor lies in memory.
_READS_LAYOUT = {"as_strided", "stride", "is_contiguous", "data_ptr", torch.as_strided}


def build_overlay(
    network: nn.Module, traced: Trace, matches: Matches, path: str, *, freeze: bool
) -> Overlay | None:
    """The overlay of a network, whose graph is used up; None where nothing is to be replaced.

    Weights of blocks become channels_last, as kernels read them, where the network's code cannot tell; blocks
    are frozen, which gives results in channels_last, under the same condition.

    Args:
        path: where the network is in the one that is fused, for the names of blocks.
        freeze: make :class:`FrozenConv` blocks, also of convolutions that nothing is fused with.
    """
    reads_layout = _reads_layout(traced) or matches.aliasing.depends_on_layout()
    freeze = freeze and not reads_layout
    restride = not (freeze or reads_layout or _uses_views(traced))
    groups = [group for group in matches.groups if _becomes_a_block(group, freeze)]
    if not groups:
        return None
    rewriter = Rewriter(traced.graph, matches)
    blocks: dict[tuple[Any, ...], str] = {}
    modules = dict(traced.modules)
    for group in groups:
        name = f"{path}.{group.conv.target if group.call.module is not None else group.conv.name}".strip(".")
        block = block_of(group, matches, name)
        if block is None:
            # Parts of it are modules that are not called any more, so hooks on them have to be looked for.
            traced.entered += [
                traced.modules[str(node.target)] for node in group.nodes if node.op == "call_module"
            ]
            rewriter.emit_call(group)
            continue
        key = (
            *map(id, (block.conv, group.norm and block.norm)),
            str(block.act),
            block.residual_order,
            block.zero_pad,
        )
        if key not in blocks:
            blocks[key] = f"blocks.{len(blocks)}"
            modules[blocks[key]] = _frozen(block) if freeze else block
            if restride:
                _make_channels_last(block.conv)
        rewriter.emit_block(group, blocks[key])
    values = values_as_inputs(traced.graph)
    keep_views_apart(traced.graph)
    if freeze:
        keep_layout_of(traced.graph, [name for name, module in traced.modules.items() if _is_opaque(module)])
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    graph = fx.GraphModule({name: module for name, module in modules.items() if name in called}, traced.graph)
    if freeze:
        reuse_memory(graph)
    # Else graph and module refer to each other, and the weights stay until the garbage collector comes by.
    graph.graph.owning_module = None
    as_traced = AsTraced(network, _read_by(network, traced), traced.entered, traced.live)
    return Overlay(graph, traced.inputs, values, as_traced)


def _becomes_a_block(group: Group, freeze: bool) -> bool:
    return group.is_fused or (freeze and group.call.module is not None)


def _frozen(block: nn.Module) -> nn.Module:
    frozen = FrozenConv.from_block(block)  # type: ignore[arg-type]
    frozen.group_name = block.group_name  # type: ignore[assignment]
    # What the snapshot is verified against, and no child of it: the block's parameters are the network's.
    frozen.__dict__["live"] = block
    return frozen


def _reads_layout(traced: Trace) -> bool:
    """Whether the code may compute something else where results come in another memory format."""
    return any(node.target in _READS_LAYOUT for node in traced.graph.nodes)


def _uses_views(traced: Trace) -> bool:
    """Whether the code may not run where results come in another memory format.

    In the graph a view becomes a reshape, but the network's own code may have to run too.
    """
    return any(
        node.target in ("view", "view_as", torch.Tensor.view)
        or (node.op == "call_module" and _is_opaque(traced.modules[str(node.target)]))
        for node in traced.graph.nodes
    )


def _is_opaque(module: nn.Module) -> bool:
    return kind_of(module) is None and not type(module).__module__.startswith("torch.nn")


def _make_channels_last(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def _read_by(network: nn.Module, traced: Trace) -> list[nn.Module]:
    """The modules whose attributes the network's code may have read: all but those that are called."""
    called = {part for leaf in traced.modules.values() for part in leaf.modules()}
    entered = set(traced.entered)
    return [
        module
        for module in network.modules()
        if module is not network and (module not in called or module in entered)
    ]
