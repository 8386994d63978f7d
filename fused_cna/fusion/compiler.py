"""``torch.compile(model, backend="fused_cna")``: the groups of the graphs that Dynamo captures, fused.

Such a graph calls functions, with parameters and buffers among its inputs, so a fused call takes them as they
are when it runs. What is left of the graph goes to another backend.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_cna import functional, ops
from fused_cna._checks import explicit_padding
from fused_cna.fusion.groups import Group, Matches, match
from fused_cna.fusion.nodes import Refused, call_of
from fused_cna.fusion.rewrite import Rewriter
from fused_cna.fusion.written_out import gather_norms

_WITH_NUMBERS = {F.batch_norm, F.elu, F.elu_, F.hardtanh, F.hardtanh_, F.leaky_relu, F.leaky_relu_}
_FRONT = inspect.signature(functional.conv_norm_act)

log = logging.getLogger(__name__)


def compile_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="fused_cna")``.

    Equivalent to ``backend="inductor"``, with one call of the operator for each group of convolution, batch
    norm in eval mode, residual addition and activation on a GPU; on other devices they stay as they are.
    Besides what :func:`fused_cna.fuse` leaves alone, nothing is fused of which a gradient is wanted, that a
    change of grad mode or autocast runs through, or in the bodies of checkpoints and control flow. The logger
    ``fused_cna.fusion.compiler`` says at INFO how much of a graph is fused, and at DEBUG what is not and why.

    CUDA graphs are torch's own: ``mode="reduce-overhead"``, or ``options={"inner": "cudagraphs"}`` without
    inductor, which copies parameters too into a graph's memory on every call. Both overwrite the results of
    one call in the next; see ``torch.compiler.cudagraph_mark_step_begin``.

    Args:
        mode: as ``torch.compile`` takes it, handed on.
        options: as ``torch.compile`` takes them, handed on but for ``"inner"``, the name of the backend for
            the fused graph: "inductor" unless given, "eager", or any of ``torch.compiler.list_backends()``.

    Raises:
        ValueError: ``"inner"`` is this backend itself, or not a name.
        RuntimeError: no kernel can run a group on a GPU, and ``fused_cna.config.strict`` is True.
    """
    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    if not isinstance(inner, str) or inner == "fused_cna":
        raise ValueError(f"options['inner'] must name another backend, such as 'eager', but got {inner!r}")
    fuse_graph(graph_module)
    if inner == "inductor":
        compiled = torch._TorchCompileInductorWrapper(mode, options, None)(graph_module, inputs)
    else:
        compiled = torch._TorchCompileWrapper(inner, mode, options, None)(graph_module, inputs)
    _forget_choices(inputs)
    return compiled  # type: ignore[no-any-return]


def fuse_graph(graph_module: fx.GraphModule) -> Matches:
    """Fuse the groups of a graph that Dynamo captured, in place; returns what was found."""
    graph = graph_module.graph
    modules = dict(graph_module.named_modules())
    gather_norms(graph, modules, _is_norm, F.batch_norm)
    _settle_numbers(graph)
    matches = match(graph, modules, _same_shape)
    # Entering and leaving a mode, such as autocast, makes no value.
    changes = [node.op == "call_function" and "example_value" not in node.meta for node in graph.nodes]
    regions = dict(zip(graph.nodes, accumulate(changes), strict=True))
    for group in matches.groups:
        if group.is_fused and (reason := _obstacle(group, regions)):
            group.leave(reason)
    _log(matches)
    rewriter = Rewriter(graph)
    for group in matches.groups:
        if group.is_fused:
            _prepare(rewriter.emit_call(group))
    graph_module.recompile()
    return matches


def _prepare(call: Node) -> None:
    """Make a call of ``conv_norm_act`` one of the operator, if it would only check what cannot change."""
    x, weight = (node.meta["example_value"] for node in call.args[:2])  # type: ignore[union-attr]
    if x.dim() == 4 and ops.takes_kernel(x):
        bound = _FRONT.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        del given["out"]
        sizes = [int(size) for size in weight.shape[2:]]
        given["padding"] = explicit_padding(given["padding"], sizes, given["stride"], given["dilation"])
        call.target, call.args, call.kwargs = ops.operator, tuple(given.values()), {}


def _forget_choices(inputs: Sequence[Any]) -> None:
    """Drop the guards that only say which of torch's implementations of a convolution would run.

    On a CPU the size decides that for a batch of one, so small images would be captured anew for nearly every
    size. The graph is right for all: torch chooses again when it runs, and the strides are the same.
    """
    environments: set[Any] = {size.node.shape_env for size in inputs if isinstance(size, torch.SymInt)}
    for shapes in environments:
        lines = [str(getattr(guard.sloc.framework_loc, "line", "")) for guard in shapes.guards]
        shapes.guards[:] = compress(shapes.guards, ["_select_conv_backend" not in line for line in lines])


def _is_norm(total: Node, x: Node, vectors: Sequence[Node]) -> bool:
    """Whether ``F.batch_norm`` makes what is written out, and no gradient is wanted of it."""
    result, held = _tensor(total), [_tensor(vector) for vector in vectors]
    if result is None or result.requires_grad or result.dim() != 4 or not _same_shape(total, x):
        return False
    return all(one is not None and one.dim() == 1 and one.dtype == result.dtype for one in held)


def _settle_numbers(graph: fx.Graph) -> None:
    """Take numbers that ``dynamic=True`` leaves open, such as ``eps``, as they are; a change recompiles."""
    for node in reversed(graph.nodes):
        if node.target in _WITH_NUMBERS and not isinstance(call_of(node, {}), Refused):
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), _settled)  # type: ignore[misc]
        elif node.target == "item" and not node.users and _settled(node) is not node:
            graph.erase_node(node)


def _settled(number: Node) -> Any:
    value = number.meta.get("example_value")
    return float(value) if isinstance(value, torch.SymFloat) and value.node.has_hint() else number


def _log(matches: Matches) -> None:
    fused = Counter(group.parts() for group in matches.groups if group.is_fused)
    kinds = "".join(f", {count} x {parts}" for parts, count in fused.most_common())
    if matches.groups:
        log.info("%d of %d convolutions are fused%s", fused.total(), len(matches.groups), kinds)
    for group in matches.groups:
        if group.reason:
            log.debug("%s: %s", group.conv.name, group.reason)


def _tensor(node: Node) -> FakeTensor | None:
    """What is known of a node's result; None where that is no plain tensor."""
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor else None


def _same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes are known to be tensors of one shape, dtype and device."""
    one, other = _tensor(a), _tensor(b)
    if one is None or other is None or one.dim() != other.dim():
        return False
    same_sizes = all(statically_known_true(p == q) for p, q in zip(one.shape, other.shape, strict=True))
    return same_sizes and one.dtype == other.dtype and one.device == other.device


def _obstacle(group: Group, regions: dict[Node, int]) -> str:
    """What keeps a group that matches from being one call, in words; empty for nothing."""
    nodes, values = group.nodes, group.values
    operands = [*nodes, *nodes[0].all_input_nodes, *values]
    result = _tensor(nodes[-1])
    if any("functorch" in (getattr(node.target, "__module__", None) or "") for node in regions):
        return "the graph has transforms of torch.func"
    if result is None or any(not isinstance(node, Node) or _tensor(node) is None for node in operands):
        return "a part of it is a module, or a tensor of a class of its own"
    if len({regions[node] for node in nodes}) > 1:
        return "grad mode, autocast or another mode changes within it"
    if result.requires_grad:
        return "a gradient is wanted"
    if not result.is_floating_point() or not all(_same_shape(group.conv, node) for node in nodes[1:]):
        return "its dtype or shape changes within it"
    vectors = [node for node in values if node not in (group.call.weight, group.call.bias)]
    dtypes = {node.meta["example_value"].dtype for node in vectors}  # type: ignore[union-attr]
    if vectors and (len(dtypes) > 1 or not dtypes <= {torch.float32, result.dtype} or result.dim() != 4):
        return "the parameters of its norm are of several dtypes, or it is not one of channels"
    return "" if result.is_cuda or ops.operator_everywhere else f"on {result.device.type} it stays as it is"
