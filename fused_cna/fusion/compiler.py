"""``torch.compile(model, backend="fused_cna")``: the groups of the graphs that Dynamo captures, fused.

Such a graph calls functions, with parameters and buffers among its inputs, so a fused call takes them as they
are when it runs. What is left of the graph goes to another backend.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_cna.fusion.calls import Norm, Refused, call_of
from fused_cna.fusion.matching import Group, Matches, match, values_of
from fused_cna.fusion.records import parts_of
from fused_cna.fusion.rewriting import Rewriter
from fused_cna.fusion.written_out import gather_norms

NAME = "fused_cna"
"""The backend's name for ``torch.compile``, which finds it by its entry point."""

_WITH_NUMBERS = {F.batch_norm, F.elu, F.elu_, F.hardtanh, F.hardtanh_, F.leaky_relu, F.leaky_relu_}

log = logging.getLogger(__name__)


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="fused_cna")``.

    Equivalent to ``backend="inductor"``, with one call of :func:`fused_cna.conv_norm_act` for each group of
    convolution, batch norm in eval mode, residual addition and activation: the fused kernel on a GPU, plain
    operations, which the other backend compiles as any others, on a CPU. Groups are those of
    :func:`fused_cna.fuse`; besides, nothing is fused of which a gradient is wanted, that a change of grad
    mode or autocast runs through, or in the bodies of ``torch.utils.checkpoint`` and control-flow operators.

    The logger ``fused_cna.fusion.compiler`` says at INFO how many groups of which kind each graph has, and
    at DEBUG why convolutions are alone. ``fused_cna.report`` does not know about compiled models.

    Args:
        graph_module: a graph as Dynamo captures it, which is changed.
        example_inputs: its inputs.
        mode: as ``torch.compile`` takes it, handed on.
        options: as ``torch.compile`` takes them, handed on but for ``"inner"``, the name of the backend for
            the fused graph: "inductor" unless given, "aot_eager", "eager", or any that
            ``torch.compiler.list_backends()`` knows, as in
            ``torch.compile(model, backend="fused_cna", options={"inner": "eager"})``.

    Raises:
        ValueError: ``"inner"`` is this backend itself, or not a name.
    """
    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    if not isinstance(inner, str) or inner == NAME:
        raise ValueError(
            "options['inner'] must be the name of another backend, such as 'inductor' or 'eager', "
            f"but got {inner!r}"
        )
    fuse_graph(graph_module)
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(graph_module, example_inputs)
    given = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    return lookup_backend(inner)(graph_module, example_inputs, **given)  # type: ignore[arg-type]


def fuse_graph(graph_module: fx.GraphModule) -> Matches:
    """Fuse the groups of a graph that Dynamo captured, in place; returns what was found."""
    graph = graph_module.graph
    gather_norms(graph, _is_norm)
    _settle_numbers(graph)
    matches = match(graph, dict(graph_module.named_modules()), _same_shape)
    obstacles = _Obstacles(graph, matches)
    for group in matches.groups:
        reason = obstacles.of(group) if group.is_fused else ""
        if reason:
            group.leave(reason)
    _log(matches)
    rewriter = Rewriter(graph, matches)
    for group in matches.groups:
        if group.is_fused:
            rewriter.emit_call(group)
    graph_module.recompile()
    return matches


def _is_norm(total: Node, x: Node, vectors: Sequence[Node]) -> bool:
    """Whether ``F.batch_norm`` makes what is written out, and no gradient is wanted of it."""
    result = _tensor(total)
    if result is None or result.requires_grad or result.dim() != 4 or not _same_shape(total, x):
        return False
    held = [_tensor(vector) for vector in vectors]
    return all(one is not None and one.dim() == 1 and one.dtype == result.dtype for one in held)


def _settle_numbers(graph: fx.Graph) -> None:
    """Take numbers that ``dynamic=True`` leaves open, such as ``eps``, as they are; a change recompiles."""
    for node in list(graph.nodes):
        if node.target not in _WITH_NUMBERS or isinstance(call_of(node, {}), Refused):
            continue
        for number in node.all_input_nodes:
            value = number.meta.get("example_value")
            if isinstance(value, torch.SymFloat) and value.node.has_hint():
                _set_argument(node, number, float(value))


def _set_argument(node: Node, old: Node, new: float) -> None:
    node.args = tuple(new if argument is old else argument for argument in node.args)
    node.kwargs = {name: new if argument is old else argument for name, argument in node.kwargs.items()}
    if not old.users and old.target == "item":
        old.graph.erase_node(old)


def _log(matches: Matches) -> None:
    fused = Counter(parts_of(group, matches) for group in matches.groups if group.is_fused)
    total = len(matches.groups) + len(matches.refused)
    if total:
        kinds = "".join(f", {count} x {parts}" for parts, count in fused.most_common())
        log.info("%d of %d convolutions are fused%s", fused.total(), total, kinds)
    for group in matches.groups:
        if group.reason:
            log.debug("%s: %s", group.conv.name, group.reason)
    for node, reason in matches.refused.items():
        log.debug("%s: %s", node.name, reason)


def _tensor(node: Node) -> FakeTensor | None:
    """What is known of a node's result; None where that is no plain tensor."""
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor else None


def _same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes are known to be tensors of one shape, dtype and device."""
    one, other = _tensor(a), _tensor(b)
    if one is None or other is None:
        return False
    return (
        one.dtype == other.dtype
        and one.device == other.device
        and one.dim() == other.dim()
        and all(statically_known_true(p == q) for p, q in zip(one.shape, other.shape, strict=True))
    )


class _Obstacles:
    """What keeps a group that matches from being one call."""

    def __init__(self, graph: fx.Graph, matches: Matches) -> None:
        self._calls = matches.calls
        self._region: dict[Node, int] = {}
        self._transforms = False
        region = 0
        for node in graph.nodes:
            # Entering and leaving a mode makes no value.
            region += node.op == "call_function" and "example_value" not in node.meta
            self._region[node] = region
            self._transforms |= "functorch" in (getattr(node.target, "__module__", None) or "")

    def of(self, group: Group) -> str:
        """The reason in words; empty for none."""
        nodes, values = group.nodes, values_of(group, self._calls)
        result = _tensor(nodes[-1])
        if self._transforms:
            return "the graph has transforms of torch.func"
        operands = [value for value in values if isinstance(value, Node)]
        if len(operands) < len(values):
            return "it is a module in the graph"
        operands += [*nodes, *nodes[0].all_input_nodes]
        if result is None or any(_tensor(node) is None for node in operands):
            return "a tensor of it is of a class of its own"
        if len({self._region[node] for node in nodes}) > 1:
            return "grad mode, autocast or another mode changes within it"
        if result.requires_grad:
            return "a gradient is wanted"
        if not result.is_floating_point() or not all(_same_shape(group.conv, node) for node in nodes[1:]):
            return "its dtype or shape changes within it"
        if not self._norm_fits(group, result.dtype):
            return "the parameters of its norm are of several dtypes"
        return ""

    def _norm_fits(self, group: Group, dtype: torch.dtype) -> bool:
        norm = self._calls.get(group.norm) if group.norm is not None else None
        if not isinstance(norm, Norm):
            return True
        vectors = [
            value for value in (norm.weight, norm.bias, norm.mean, norm.var) if isinstance(value, Node)
        ]
        dtypes = {value.meta["example_value"].dtype for value in vectors}
        return len(dtypes) == 1 and dtypes <= {torch.float32, dtype}
