"""Batch norms that are written out as arithmetic, as ``FrozenBatchNorm2d`` of torchvision and timm are.

``x * scale + (bias - mean * scale)`` with ``scale = weight * (var + eps).rsqrt()``, each of the four vectors
reshaped to [1, K, 1, 1].
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch.fx import Graph, Node

from fused_cna.fusion.aliasing import Aliasing
from fused_cna.fusion.calls import Conv, call_of, is_value

_SHAPE = (1, -1, 1, 1)


def gather_norms(graph: Graph, fits: Callable[[Node, Node, Sequence[Node]], bool]) -> None:
    """Replace batch norms of convolutions that are written out by calls of ``F.batch_norm``.

    Args:
        fits: whether that takes a convolution's result and four vectors, and makes what the sum makes.
    """
    found = {node: parts for node in graph.nodes if (parts := _norm(node)) is not None}
    if not found:
        return
    calls = {node: call for node in graph.nodes if (call := call_of(node, {})) is not None}
    aliasing = Aliasing(graph, calls, {})
    for node, (x, reshaped, eps) in found.items():
        vectors = [one.args[0] for one in reshaped]
        changed = [aliasing.changed_between(one, one, node) for one in reshaped]
        if any(changed) or not fits(node, x, vectors):
            continue
        mean, var, weight, bias = vectors
        with graph.inserting_before(node):
            made = graph.call_function(F.batch_norm, (x, mean, var, weight, bias, False, 0.1, eps))
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        _erase_unused(graph, node)


def _norm(node: Node) -> tuple[Node, list[Any], Any] | None:
    """x, the reshaped (mean, var, weight, bias), and eps, where ``node`` is the last addition of a norm."""
    product, shift = _operands(node, operator.add)
    x, scale = _operands(product, operator.mul)
    bias, moved = _operands(shift, operator.sub)
    mean, same_scale = _operands(moved, operator.mul)
    weight, deviation = _operands(scale, operator.mul)
    if scale is not same_scale or not _is_method(deviation, "rsqrt"):
        return None
    var, eps = _operands(deviation.args[0], operator.add)
    reshaped = [mean, var, weight, bias]
    is_conv = isinstance(x, Node) and isinstance(call_of(x, {}), Conv) and len(x.users) == 1
    is_number = isinstance(eps, float) or _is_method(eps, "item")
    return (x, reshaped, eps) if is_conv and is_number and all(map(_is_vector, reshaped)) else None


def _operands(node: Any, function: Callable[..., Any]) -> tuple[Any, Any]:
    is_call = isinstance(node, Node) and node.op == "call_function" and node.target is function
    return node.args if is_call and len(node.args) == 2 else (None, None)  # type: ignore[return-value]


def _is_method(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def _is_vector(node: Any) -> bool:
    """Whether ``node`` is a parameter or buffer, reshaped to one value for each channel."""
    if not _is_method(node, "reshape", "view") or node.args[1:] not in (_SHAPE, (_SHAPE,)):
        return False
    return isinstance(node.args[0], Node) and is_value(node.args[0])


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node of the arithmetic, and those that only it used."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        is_arithmetic = source.target in (
            operator.add,
            operator.sub,
            operator.mul,
            "rsqrt",
            "reshape",
            "view",
        )
        if is_arithmetic and not source.users:
            _erase_unused(graph, source)
