"""Batch norms that are written out as arithmetic, as ``FrozenBatchNorm2d`` of DETR, torchvision and timm are.

``x * scale + (bias - mean * scale)`` with ``scale = weight * (var + eps).rsqrt()``: of four vectors that are
reshaped to [1, K, 1, 1] each, or of sums and products that are.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from fused_cna.fusion.aliasing import Aliasing
from fused_cna.fusion.nodes import Conv, batch_norm_written_out, call_of, is_value

_SHAPE = (1, -1, 1, 1)
_ARITHMETIC = (operator.add, operator.sub, operator.mul, "rsqrt", "reshape", "view")


def gather_norms(
    graph: Graph,
    modules: dict[str, nn.Module],
    fits: Callable[[Node, Node, Sequence[Node]], bool],
    function: Callable[..., Tensor] = batch_norm_written_out,
) -> None:
    """Replace batch norms of convolutions that are written out by calls of a function.

    Args:
        modules: the targets of the graph's ``call_module`` nodes.
        fits: whether that takes a convolution's result and four vectors, and makes what the sum makes.
        function: takes what ``F.batch_norm`` takes.
    """
    found = {node: parts for node in graph.nodes if (parts := _norm(node, modules)) is not None}
    if not found:
        return
    calls = {node: call for node in graph.nodes if (call := call_of(node, modules)) is not None}
    aliasing = Aliasing(graph, calls, modules)
    for node, (x, vectors, eps) in found.items():
        if any(aliasing.changed_between(one, one, node) for one in vectors) or not fits(node, x, vectors):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(function, (x, *vectors, False, 0.1, eps))
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        _erase_unused(graph, node)


def _norm(node: Node, modules: dict[str, nn.Module]) -> tuple[Node, list[Any], Any] | None:
    """x, (mean, var, weight, bias), and eps, where ``node`` is the last addition of a norm."""
    product, shift = _operands(node, operator.add)
    x, scale = _operands(product, operator.mul)
    vectors_are_reshaped = not _is_reshaped(scale)
    if not vectors_are_reshaped:
        scale, shift = scale.args[0], shift.args[0] if _is_reshaped(shift) else None
    bias, moved = _operands(shift, operator.sub)
    mean, same_scale = _operands(moved, operator.mul)
    weight, deviation = _operands(scale, operator.mul)
    if scale is not same_scale or not _is_method(deviation, "rsqrt"):
        return None
    var, eps = _operands(deviation.args[0], operator.add)
    vectors = [mean, var, weight, bias]
    if vectors_are_reshaped:
        vectors = [one.args[0] if _is_reshaped(one) else None for one in vectors]
    is_conv = isinstance(x, Node) and isinstance(call_of(x, modules), Conv) and len(x.users) == 1
    is_number = isinstance(eps, float) or _is_method(eps, "item")
    are_values = all(isinstance(one, Node) and is_value(one) for one in vectors)
    return (x, vectors, eps) if is_conv and is_number and are_values else None


def _operands(node: Any, function: Callable[..., Any]) -> tuple[Any, Any]:
    is_call = isinstance(node, Node) and node.op == "call_function" and node.target is function
    return node.args if is_call and len(node.args) == 2 else (None, None)  # type: ignore[return-value]


def _is_method(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def _is_reshaped(node: Any) -> bool:
    """Whether ``node`` gives the values of a vector to the channels of images."""
    return _is_method(node, "reshape", "view") and node.args[1:] in (_SHAPE, (_SHAPE,))


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node of the arithmetic, and those that only it used."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.target in _ARITHMETIC and not source.users:
            _erase_unused(graph, source)
