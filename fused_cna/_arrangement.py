"""Calls of a ``ConvNormAct`` that go to the operator without Python while the module is as it was.

What Python finds out about a module, from its classes, numbers and hooks, is the same at nearly every call.
So what it comes to is kept, with all that it was taken from: each later call compares that, object by object,
and takes the tensors as they are then, in C++ (csrc/torch/arrangement.cpp). Nothing of a tensor is kept, and
no module: an arrangement holds for whatever looks the same.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fused_cna import _extension, activation, layers, ops

calls: dict[int, Callable[[nn.Module, Tensor, Tensor | None], Any]] = {}
"""``call(module, x, residual)`` by the id of a module: the result, or NotImplemented where Python is needed.

An id may come to be another module's, which is compared like any.
"""

_times: dict[int, int] = {}
_MOST_TIMES = 8
_MOST_CALLS = 10_000

# What a call depends on besides tensors, by the module that has it.
_OWN = ("training", "residual_order", "zero_pad")
_OF_CONV = ("forward", "stride", "padding", "dilation", "groups", "padding_mode")
_OF_NORM = ("forward", "training", "eps")
_OF_ACT = ("forward", *activation.ATTRIBUTES)
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in layers.HOOKS)
# Where the operator's tensors are among its arguments, and their names in the modules.
_CONV_TENSORS = {ops.TENSORS[name]: name for name in ("weight", "bias")}
_NORM_TENSORS = {ops.TENSORS[name]: held for name, held in layers.NORM_TENSORS.items()}
_RUNNING_MEAN, _RESIDUAL = ops.TENSORS["running_mean"], ops.TENSORS["residual"]
_FIRST_OPTION = ops.TENSORS["running_var"] + 1


class _UnclearError(Exception):
    """A call depends on something that cannot be compared object by object."""


def keep(module: nn.Module, arguments: Sequence[Any]) -> None:
    """Let later calls of ``module`` go to the operator with these arguments, its tensors as they are then.

    Nothing is kept where they depend on more than is compared, nor for a module that keeps changing.
    """
    if not _extension.is_available() or _times.get(id(module), 0) >= _MOST_TIMES:
        return
    if len(_times) >= _MOST_CALLS:
        _times.clear()
        calls.clear()
    _times[id(module)] = _times.get(id(module), 0) + 1
    try:
        described = _describe(module, arguments)
    except _UnclearError:
        calls.pop(id(module), None)
        return
    where: list[tuple[str, Any, bool]] = [("operator", ops.operator, True)]
    if not arguments[0].is_cuda:
        where.append(("operator_everywhere", ops.operator_everywhere, True))
    calls[id(module)] = _extension.module().arrange(
        ops.operator.name(),
        described,
        [(vars(module_hooks), ([], _GLOBAL_HOOKS)), (vars(ops), (where, ()))],
        arguments[0],
        *arguments[_FIRST_OPTION:_RESIDUAL],
        arguments[-1],
    )


def _describe(module: Any, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The module with its parts, as C++ compares them."""
    conv, norm, act = (module._modules[name] for name in ("conv", "norm", "act"))
    if norm is None or act is None:
        raise _UnclearError
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or type(conv.padding) is not tuple:
        raise _UnclearError
    norm_tensors = {} if arguments[_RUNNING_MEAN] is None else _NORM_TENSORS
    inside = [(name, _part(part, _OF_ACT)) for name, part in norm._modules.items()]
    return _part(
        module,
        _OWN,
        hooks=(),
        children=[
            ("conv", _part(conv, _OF_CONV, _held(conv, _CONV_TENSORS, arguments))),
            ("norm", _part(norm, _OF_NORM, _held(norm, norm_tensors, arguments), children=inside)),
            ("act", _part(act, _OF_ACT)),
        ],
    )


def _part(
    module: Any,
    attributes: Iterable[str],
    tensors: Sequence[tuple[int, str, str, bool]] = (),
    hooks: Sequence[str] = layers.HOOKS,
    children: Sequence[tuple[str, Any]] = (),
) -> tuple[Any, ...]:
    """A module's class; attributes, and those that are to be empty; where its tensors are; its children."""
    if len(module._modules) != len(children):
        raise _UnclearError
    values = vars(module)
    compared = [(name, values.get(name), name in values) for name in attributes]
    if not all(_never_changes(value) for _, value, _ in compared):
        raise _UnclearError
    return type(module), (compared, hooks), tensors, children


def _never_changes(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_never_changes, value))
    return value is None or type(value) in (bool, int, float, str)


def _held(module: Any, names: dict[int, str], arguments: Sequence[Any]) -> list[tuple[int, str, str, bool]]:
    """Which of the operator's tensors, counted from the weight, lies where; and whether it is None."""
    found = []
    for index, name in names.items():
        holder = "_parameters" if name in module._parameters else "_buffers"
        tensor = getattr(module, holder).get(name, module)
        if tensor is not arguments[index]:
            raise _UnclearError
        found.append((index - 1, holder, name, tensor is None))
    return found
