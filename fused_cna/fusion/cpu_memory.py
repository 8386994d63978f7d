"""Memory that a graph of ``FrozenConv`` needs no more, written to again: fresh memory is dear on a CPU.

Every page that the system hands out is cleared first, which takes longer than a layer bound by memory.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_cna.fusion.frozen import FrozenConv, is_plain, runs_onednn

# What reads its input without returning a view of it.
_READING_MODULES = (FrozenConv, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)
_READING_FUNCTIONS = {
    torch.mean,
    torch.nn.functional.adaptive_avg_pool2d,
    torch.nn.functional.avg_pool2d,
}
_MULTIPLICATIONS = {operator.mul, torch.mul}


def multiply_into(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``, in the memory of ``x`` where it fits there and nothing keeps ``x``."""
    if (
        isinstance(scale, Tensor)
        and runs_onednn()
        and is_plain(x, x.dtype)
        and is_plain(scale, x.dtype)
        and x.dim() == scale.dim()
        and all(n in (1, m) for n, m in zip(scale.shape, x.shape, strict=True))
    ):
        return x.mul_(scale)
    return x * scale


def reuse_memory(graph_module: fx.GraphModule) -> int:
    """Let residual additions and multiplications overwrite what nothing reads later.

    A ``FrozenConv`` overwrites its residual, and ``x * scale`` becomes :func:`multiply_into`, where the
    overwritten tensor was made by a ``FrozenConv`` and everything else that reads it runs before and returns
    no view of it. A forward hook that keeps the output of a ``FrozenConv`` may see it overwritten.

    Args:
        graph_module: changed in place; its ``FrozenConv`` modules too.

    Returns:
        How many operations overwrite.
    """
    modules = dict(graph_module.named_modules())
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    calls: dict[FrozenConv, list[bool]] = {}
    count = 0
    for node in list(graph_module.graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, FrozenConv):
            residual = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
            calls.setdefault(module, []).append(_is_last_use(residual, node, modules, order))
        elif node.op == "call_function" and node.target in _MULTIPLICATIONS and len(node.args) == 2:
            x = next((arg for arg in node.args if _is_last_use(arg, node, modules, order)), None)
            if x is not None and not node.kwargs:
                scale = node.args[1] if node.args[0] is x else node.args[0]
                node.target, node.args = multiply_into, (x, scale)
                count += 1
    for module, last_uses in calls.items():
        module.overwrites_residual = all(last_uses)
        count += len(last_uses) if module.overwrites_residual else 0
    graph_module.recompile()
    return count


def _is_last_use(value: Any, node: fx.Node, modules: dict[str, nn.Module], order: dict[fx.Node, int]) -> bool:
    """Whether ``node`` may overwrite ``value``, one of its arguments."""
    if not isinstance(value, fx.Node) or not _is_fresh(value, modules):
        return False
    if sum(arg is value for arg in (*node.args, *node.kwargs.values())) != 1:
        return False
    return all(
        user is node or (order[user] < order[node] and _only_reads(user, modules)) for user in value.users
    )


def _is_fresh(value: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(value.target)) if value.op == "call_module" else None
    return isinstance(module, FrozenConv) and module.act is None


def _only_reads(user: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if user.op == "call_module":
        module = modules[str(user.target)]
        return type(module) in _READING_MODULES and (not isinstance(module, FrozenConv) or module.act is None)
    if user.op == "call_method":
        return user.target == "mean"
    return user.op == "call_function" and user.target in _READING_FUNCTIONS
