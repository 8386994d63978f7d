"""The functional form of a network: what each node of a graph computes, with parameters as values.

Modules, functions, methods and in-place variants that compute the same read alike here, and whoever asks what
follows a convolution asks here only. Nodes are those of a ``torch.fx`` graph, however it came about.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from fused_cna import activation, layers

Value = Tensor | Node | None
"""A parameter: the tensor itself where a module holds it, or the node that hands it in."""


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution."""

    x: Node
    weight: Value
    bias: Value
    module: nn.Conv2d | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


@dataclass(frozen=True)
class Norm:
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


@dataclass(frozen=True)
class Act:
    """An activation of the table in ``activation``."""

    x: Node
    name: str
    params: tuple[float, ...]
    module: nn.Module | None
    overwrites: bool


@dataclass(frozen=True)
class Add:
    """A sum of two nodes; ``overwritten`` is the one that holds the result afterwards, if any."""

    a: Node
    b: Node
    overwritten: Node | None


@dataclass(frozen=True)
class Pad:
    """Zeros around an image: (top, bottom, left, right)."""

    x: Node
    amounts: tuple[int, int, int, int]


@dataclass(frozen=True)
class Refused:
    """Something that computes one of the above, but must be left alone, and why."""

    kind: type
    x: Node
    reason: str


Call = Conv | Norm | Act | Add | Pad | Refused


def call_of(node: Node, modules: dict[str, nn.Module]) -> Call | None:
    """What a node computes; None for everything that has no part in a fused group.

    ``modules`` are the targets of ``call_module`` nodes.
    """
    if node.op == "call_module":
        return _module_call(node, modules[str(node.target)])
    if node.op in ("call_function", "call_method"):
        describe = _FUNCTIONS.get(node.target)
        return None if describe is None else describe(node)
    return None


def _module_call(node: Node, module: nn.Module) -> Call | None:
    x = _only_tensor(node)
    if x is None:
        return None
    kind = kind_of(module)
    if kind is None:
        return None
    reason = _why_left_alone(module)
    if reason:
        return Refused(kind, x, reason)
    if isinstance(module, nn.Conv2d):
        sizes = (module.stride, module.padding, module.dilation, module.groups)
        return Conv(x, module.weight, module.bias, module, *sizes)
    if kind is Norm:
        return _norm_module(x, module)
    if kind is Pad:
        left, right, top, bottom = module.padding  # type: ignore[misc]
        return Pad(x, (top, bottom, left, right))  # type: ignore[arg-type]
    described = activation.describe(module)
    if described is None:
        return None
    return Act(x, *described, module, bool(getattr(module, "inplace", False)))


def kind_of(module: nn.Module) -> type | None:
    """Which part of a group a module could be by its class; subclasses of nn.Conv2d are all convolutions."""
    if isinstance(module, nn.Conv2d):
        return Conv
    if layers.is_batch_norm(module) or isinstance(module, nn.BatchNorm2d):
        return Norm
    if type(module) is nn.ZeroPad2d or (type(module) is nn.ConstantPad2d and module.value == 0):
        return Pad
    return Act if activation.describe(module) is not None and type(module) is not nn.Identity else None


def _why_left_alone(module: nn.Module) -> str:
    """Why a module that computes a part of a group cannot be one; empty if it can."""
    name = type(module).__name__
    if parametrize.is_parametrized(module):
        return f"{layers.class_of(module).__name__} is parametrized"
    if layers.has_hooks(module) or any(map(layers.has_hooks, module.children())):
        return f"{name} has hooks, or a forward of its own"
    if isinstance(module, nn.Conv2d) and not layers.is_conv(module):
        return f"{name} is a subclass of Conv2d with a forward of its own"
    if isinstance(module, nn.Conv2d) and "weight" not in module._parameters:
        return f"{name} computes its weight"
    if isinstance(module, nn.BatchNorm2d) and not layers.is_batch_norm(module):
        return f"{name} is a subclass of BatchNorm2d with a forward of its own"
    return ""


def _norm_module(x: Node, module: nn.Module) -> Norm | Refused:
    fusible = layers.epilogue(module, nn.Identity(), "add_act")
    if fusible is None:
        name = type(module).__name__
        if getattr(module, "running_mean", None) is None:
            return Refused(Norm, x, f"{name} has no running statistics")
        return Refused(Norm, x, f"{name} has parts that are not understood")
    (weight, bias, mean, var, eps), act, _ = fusible
    return Norm(x, weight, bias, mean, var, eps, module, *(("identity", ()) if act is None else act))


def _only_tensor(node: Node) -> Node | None:
    """The node that a module or function is called with, by position or by keyword, if it is the only one."""
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Node) else None


def arguments(node: Node, names: Sequence[str], defaults: Sequence[Any] = ()) -> dict[str, Any] | None:
    """The arguments of a call by name; None where they are not such."""
    bound = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound if set(bound) == set(names) else None


def is_value(argument: object) -> bool:
    """Whether an argument is a parameter that is handed in, rather than computed; None is one."""
    return argument is None or (isinstance(argument, Node) and argument.op in ("placeholder", "get_attr"))


def _conv_function(node: Node) -> Call | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = arguments(node, names, (None, 1, 0, 1, 1))
    if given is None or not isinstance(given["input"], Node):
        return None
    x, weight, bias, *sizes = (given[name] for name in names)
    if weight is None or not is_value(weight) or not is_value(bias):
        return Refused(Conv, x, "its weight is computed")
    if any(
        isinstance(part, Node)
        for size in sizes
        for part in (size if isinstance(size, (tuple, list)) else (size,))
    ):
        return Refused(Conv, x, "its stride, padding or dilation is computed")
    return Conv(x, weight, bias, None, *sizes)


def batch_norm_written_out(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """A batch norm in eval mode as DETR writes it, which promotes dtypes as ``F.batch_norm`` does not."""
    scale = weight * (var + eps).rsqrt()
    shift = bias - mean * scale
    return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def _batch_norm_function(node: Node) -> Call | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = arguments(node, names, (None, None, False, 0.1, 1e-5))
    if given is None or not isinstance(given["input"], Node):
        return None
    x, mean, var, weight, bias, training, _, eps = (given[name] for name in names)
    if training is not False:
        return Refused(Norm, x, "its batch norm uses the statistics of the batch")
    if mean is None or var is None or not all(map(is_value, (mean, var, weight, bias))):
        return Refused(Norm, x, "its batch norm has vectors that are computed")
    return Norm(x, weight, bias, mean, var, eps, None) if isinstance(eps, float) else None


def _act(
    name: str, *params: str, defaults: tuple[float, ...] = (), overwrites: bool = False
) -> Callable[[Node], Call | None]:
    def describe(node: Node) -> Call | None:
        given = arguments(node, ("input", *params, "inplace"), (*defaults, False))
        if given is None or not isinstance(given["input"], Node):
            return None
        numbers = tuple(given[param] for param in params)
        if not all(isinstance(number, (int, float)) for number in numbers):
            return None
        return Act(given["input"], name, numbers, None, overwrites or bool(given["inplace"]))

    return describe


def _gelu(node: Node) -> Call | None:
    given = arguments(node, ("input", "approximate"), ("none",))
    if given is None or not isinstance(given["input"], Node) or given["approximate"] not in ("none", "tanh"):
        return None
    return Act(given["input"], "gelu" if given["approximate"] == "none" else "gelu_tanh", (), None, False)


def _clamp(
    names: tuple[str, str], overwrites: bool, defaults: tuple[float | None, float | None]
) -> Callable[[Node], Call | None]:
    """ReLU or ReLU6, written as a clamp."""

    def describe(node: Node) -> Call | None:
        given = arguments(node, ("input", *names, "inplace"), (*defaults, False))
        if given is None or not isinstance(given["input"], Node) or given[names[0]] != 0:
            return None
        name = (
            {None: "relu", 6: "relu6"}.get(given[names[1]]) if not isinstance(given[names[1]], Node) else None
        )
        return name and Act(given["input"], name, (), None, overwrites or bool(given["inplace"]))  # type: ignore[return-value]

    return describe


def _add(overwrites: bool) -> Callable[[Node], Call | None]:
    def describe(node: Node) -> Call | None:
        given = arguments(node, ("input", "other", "alpha"), (1,))
        if given is None or given["alpha"] != 1 or isinstance(given["alpha"], (bool, Node)):
            return None
        a, b = given["input"], given["other"]
        if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
            return None
        return Add(a, b, a if overwrites else None)

    return describe


def _pad(node: Node) -> Call | None:
    given = arguments(node, ("input", "pad", "mode", "value"), ("constant", None))
    if given is None or not isinstance(given["input"], Node) or not isinstance(given["pad"], (tuple, list)):
        return None
    amounts = given["pad"]
    if (
        given["mode"] != "constant"
        or given["value"] not in (None, 0)
        or not all(isinstance(a, int) for a in amounts)
    ):
        return None
    left, right, top, bottom = (*amounts, 0, 0, 0, 0)[:4] if len(amounts) in (2, 4) else (0, 0, 0, 0)
    return Pad(given["input"], (top, bottom, left, right)) if len(amounts) in (2, 4) else None


_FUNCTIONS: dict[Any, Callable[[Node], Call | None]] = {
    torch.conv2d: _conv_function,
    F.conv2d: _conv_function,
    F.batch_norm: _batch_norm_function,
    batch_norm_written_out: _batch_norm_function,
    F.pad: _pad,
    torch._C._nn.pad: _pad,
    F.gelu: _gelu,
    F.hardtanh: _clamp(("min_val", "max_val"), False, (-1.0, 1.0)),
    F.hardtanh_: _clamp(("min_val", "max_val"), True, (-1.0, 1.0)),
    torch.clamp: _clamp(("min", "max"), False, (None, None)),
    torch.clamp_: _clamp(("min", "max"), True, (None, None)),
    "clamp": _clamp(("min", "max"), False, (None, None)),
    "clamp_": _clamp(("min", "max"), True, (None, None)),
    operator.add: _add(False),
    operator.iadd: _add(True),
    torch.add: _add(False),
    "add": _add(False),
    "add_": _add(True),
}
for _name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish", "sigmoid", "tanh"):
    for _owner in (F, torch):
        for _spelling in (_name, _name + "_"):
            if callable(_function := getattr(_owner, _spelling, None)):
                _FUNCTIONS[_function] = _act(_name, overwrites=_spelling != _name)
for _name in ("relu", "sigmoid", "tanh"):
    _FUNCTIONS[_name] = _act(_name)
    _FUNCTIONS[_name + "_"] = _act(_name, overwrites=True)
for _owner in (F, torch._C._nn):
    for _spelling in ("leaky_relu", "leaky_relu_"):
        if callable(_function := getattr(_owner, _spelling, None)):
            _FUNCTIONS[_function] = _act(
                "leaky_relu", "negative_slope", defaults=(0.01,), overwrites=_spelling[-1] == "_"
            )
    for _spelling in ("elu", "elu_"):
        if callable(_function := getattr(_owner, _spelling, None)):
            _FUNCTIONS[_function] = _act("elu", "alpha", defaults=(1.0,), overwrites=_spelling[-1] == "_")
