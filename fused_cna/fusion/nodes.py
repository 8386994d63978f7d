"""The functional form of a network: what each node of a graph computes, with parameters as values.

Modules, functions, methods and in-place variants that compute the same read alike here, and whoever asks what
follows a convolution asks here only. Nodes are those of a ``torch.fx`` graph, however it came about.
"""

import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fused_cna import activation, layers

Value = Tensor | Node | None
"""A parameter: the tensor itself where a module holds it, or the node that hands it in."""


class Conv(NamedTuple):
    """A 2-D convolution."""

    x: Node
    weight: Value
    bias: Value
    module: nn.Conv2d | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int


class Norm(NamedTuple):
    """A batch norm by its running statistics, and the activation that it may have inside."""

    x: Node
    weight: Value
    bias: Value
    mean: Value
    var: Value
    eps: float
    module: nn.Module | None
    act: str = "identity"
    act_params: tuple[float, ...] = ()


class Act(NamedTuple):
    """An activation of the table in ``activation``; ``overwritten`` is its input, if it works in place."""

    x: Node
    name: str
    params: tuple[float, ...]
    module: nn.Module | None
    overwritten: Node | None


class Add(NamedTuple):
    """A sum of two nodes; ``overwritten`` is the one that holds the result afterwards, if any."""

    a: Node
    b: Node
    overwritten: Node | None


class Pad(NamedTuple):
    """Zeros around an image: (top, bottom, left, right)."""

    x: Node
    amounts: tuple[int, int, int, int]


class Refused(NamedTuple):
    """Something that computes one of the above, but must be left alone, and why."""

    kind: type
    reason: str


Call = Conv | Norm | Act | Add | Pad | Refused


def call_of(node: Node, modules: dict[str, nn.Module]) -> Call | None:
    """What a node computes; None for everything that has no part in a fused group.

    ``modules`` are the targets of ``call_module`` nodes.
    """
    if node.op == "call_module":
        return _module_call(node, modules[str(node.target)])
    if node.target not in _FUNCTIONS:
        return None
    describe, signature, overwrites = _FUNCTIONS[node.target]
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    x = bound.args[0]
    call = describe(*bound.args) if isinstance(x, Node) else None
    return call._replace(overwritten=x) if call and overwrites else call


def _module_call(node: Node, module: Any) -> Call | None:
    inputs: list[Any] = [*node.args, *node.kwargs.values()]
    kind = kind_of(module)
    if kind is None or len(inputs) != 1 or not isinstance(inputs[0], Node):
        return None
    (x,) = inputs
    if reason := _why_left_alone(module):
        return Refused(kind, reason)
    if kind is Conv:
        sizes = (module.stride, module.padding, module.dilation, module.groups)
        return Conv(x, module.weight, module.bias, module, *sizes)
    if kind is Pad:
        left, right, top, bottom = module.padding
        return Pad(x, (top, bottom, left, right))
    if kind is Act:
        overwritten = x if getattr(module, "inplace", False) else None
        return Act(x, *activation.describe(module), module, overwritten)  # type: ignore[misc, call-arg]
    if (known := layers.epilogue(module, layers._IDENTITY, "add_act")) is None:
        lacks = getattr(module, "running_mean", None) is None
        reason = "has no running statistics" if lacks else "has parts that are not understood"
        return Refused(Norm, f"{type(module).__name__} {reason}")
    vectors, act, _ = known
    return Norm(*(x, *vectors, module, *(act or ())))


def kind_of(module: nn.Module) -> type | None:
    """Which part of a group a module could be by its class; subclasses of nn.Conv2d are all convolutions."""
    if isinstance(module, nn.Conv2d):
        return Conv
    if layers.is_batch_norm(module) or isinstance(module, nn.BatchNorm2d):
        return Norm
    if type(module) is nn.ZeroPad2d or (type(module) is nn.ConstantPad2d and module.value == 0):
        return Pad
    return Act if activation.describe(module) is not None and type(module) is not nn.Identity else None


def _classes(parts: Any) -> list[str]:
    return [type(part).__name__ for part in parts]


def _why_left_alone(module: nn.Module) -> str:
    """Why a module that computes a part of a group cannot be one; empty if it can."""
    name = type(module).__name__
    if parametrize.is_parametrized(module):
        made: Any = module.parametrizations
        said = ", ".join(f"its {which} by {' and '.join(_classes(made[which]))}" for which in made)
        return f"{layers.class_of(module).__name__} is parametrized, {said}"
    for part in (module, *module.children()):
        if hooks := layers.hooks_of(part):
            return f"{type(part).__name__} has {hooks}"
    for base, is_known in ((nn.Conv2d, layers.is_conv), (nn.BatchNorm2d, layers.is_batch_norm)):
        if isinstance(module, base) and not is_known(module):
            return f"{name} is a subclass of {base.__name__} with a forward of its own"
    computes = isinstance(module, nn.Conv2d) and "weight" not in module._parameters
    return f"{name} computes its weight" if computes else ""


def is_value(argument: object) -> bool:
    """Whether an argument is a parameter that is handed in, rather than computed; None is one."""
    return argument is None or (isinstance(argument, Node) and argument.op in ("placeholder", "get_attr"))


def batch_norm_written_out(x: Tensor, *arguments: Any) -> Tensor:
    """A batch norm in eval mode as DETR writes it, which promotes dtypes as ``F.batch_norm`` does not.

    The arguments are those of ``F.batch_norm``, all of them.
    """
    mean, var, weight, bias, _, _, eps = arguments
    scale = weight * (var + eps).rsqrt()
    shift = bias - mean * scale
    return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def _conv(x: Node, weight: Any, bias: Any, *sizes: Any) -> Call:
    if weight is None or not is_value(weight) or not is_value(bias):
        return Refused(Conv, "its weight is computed")
    if any(isinstance(part, Node) for part in pytree.tree_leaves(sizes)):
        return Refused(Conv, "its stride, padding or dilation is computed")
    return Conv(x, weight, bias, None, *sizes)


def _batch_norm(x: Node, mean: Any, var: Any, weight: Any, bias: Any, *options: Any) -> Call | None:
    training, _, eps = options
    if training is not False:
        return Refused(Norm, "its batch norm uses the statistics of the batch")
    if mean is None or var is None or not all(map(is_value, (mean, var, weight, bias))):
        return Refused(Norm, "its batch norm has vectors that are computed")
    return Norm(x, weight, bias, mean, var, eps, None) if isinstance(eps, float) else None


def _act(name: str | None, x: Node, *given: Any) -> Call | None:
    """An activation by its parameters and ``inplace``; None where it is not known, or they are computed."""
    *params, inplace = given
    is_known = isinstance(inplace, bool) and all(isinstance(param, (int, float)) for param in params)
    return Act(x, name, tuple(params), None, x if inplace else None) if name and is_known else None


def _chosen(x: Node, *given: Any) -> Call | None:
    """An activation that the other arguments choose."""
    names = {("none",): "gelu", ("tanh",): "gelu_tanh", (0, None): "relu", (0, 6): "relu6"}
    *key, inplace = given
    return _act(names.get(tuple(key)), x, inplace)


def _add(a: Node, b: Any, alpha: Any) -> Call | None:
    is_sum = isinstance(b, Node) and a is not b and type(alpha) in (int, float) and alpha == 1
    return Add(a, b, None) if is_sum else None


def _pad(x: Node, amounts: Any, mode: Any, value: Any) -> Call | None:
    if mode != "constant" or value not in (None, 0) or not isinstance(amounts, (tuple, list)):
        return None
    if len(amounts) not in (2, 4) or not all(isinstance(amount, int) for amount in amounts):
        return None
    left, right, top, bottom = (*amounts, 0, 0)[:4]
    return Pad(x, (top, bottom, left, right))


# By the name in torch: what describes a call, and a function that has its parameters.
_BY_NAME: dict[str, tuple[Callable[..., Call | None], Callable[..., Any]]] = {
    "conv2d": (_conv, lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: ...),
    "pad": (_pad, lambda input, pad, mode="constant", value=None: ...),
    "add": (_add, lambda input, other, alpha=1: ...),
    "clamp": (_chosen, lambda input, min=None, max=None, inplace=False: ...),
    "hardtanh": (_chosen, lambda input, min_val=-1.0, max_val=1.0, inplace=False: ...),
    "gelu": (_chosen, lambda input, approximate="none", inplace=False: ...),
    "elu": (partial(_act, "elu"), lambda input, alpha=1.0, inplace=False: ...),
    "leaky_relu": (partial(_act, "leaky_relu"), lambda input, negative_slope=0.01, inplace=False: ...),
}
for _name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish", "sigmoid", "tanh"):
    _BY_NAME[_name] = (partial(_act, _name), lambda input, inplace=False: ...)

# By function, or name of a method: what describes a call, its parameters, and whether it works in place.
_norm = (_batch_norm, inspect.signature(F.batch_norm), False)
_FUNCTIONS: dict[Any, tuple[Any, inspect.Signature, bool]] = {
    F.batch_norm: _norm,
    batch_norm_written_out: _norm,
}
for _name, (_describe, _parameters) in _BY_NAME.items():
    for _spelling in (_name, _name + "_"):
        for _owner in (F, torch, torch._C._nn, Tensor):
            if callable(_function := getattr(_owner, _spelling, None)):
                _target = _spelling if _owner is Tensor else _function
                _FUNCTIONS[_target] = (_describe, inspect.signature(_parameters), _spelling != _name)
_FUNCTIONS |= {operator.add: _FUNCTIONS["add"], operator.iadd: _FUNCTIONS["add_"]}
