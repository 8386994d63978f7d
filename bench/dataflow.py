"""The convolutions of a network and what follows each, read from one forward pass without data."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.layer_list import Layer

ACTIVATIONS = {
    "relu": "ReLU",
    "silu": "SiLU",
    "sigmoid": "Sigmoid",
    "hardswish": "Hardswish",
    "hardsigmoid": "Hardsigmoid",
    "leaky_relu": "LeakyReLU",
    "gelu": "GELU",
    "tanh": "Tanh",
    "mish": "Mish",
}


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass, its number in order, and the operations whose results it takes."""

    index: int
    name: str
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    sources: list["Operation"]
    consumers: list["Operation"] = field(default_factory=list)

    @property
    def only_consumer(self) -> "Operation | None":
        return self.consumers[0] if len(self.consumers) == 1 else None

    @property
    def activation(self) -> str | None:
        """The activation as the csv names it; None where this is none."""
        if self.name == "hardtanh" and tuple(self.arguments[1:3]) == (0.0, 6.0):
            return "ReLU6"
        return ACTIVATIONS.get(self.name)


class _Recorder(TorchDispatchMode):
    """Follows tensors by identity, so modules, functions and in-place operators read alike.

    Tensors are kept, because the identity of one that is gone may come again.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        start = Operation(0, "input", (), tuple(x.shape), [])
        self.operations = [start]
        self._made_by = {id(x): start}
        self._kept = [x]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) else result
        sources = [self._made_by[id(one)] for one in _tensors(args) if id(one) in self._made_by]
        if isinstance(output, Tensor) and sources:
            name = func._schema.name.removeprefix("aten::").rstrip("_")
            made = Operation(len(self.operations), name, args, tuple(output.shape), sources)
            for source in sources:
                source.consumers.append(made)
            self.operations.append(made)
            for one in _tensors((result,)):
                self._made_by[id(one)] = made
                self._kept.append(one)
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def convolutions(network: nn.Module, image: tuple[int, int]) -> list[Layer]:
    """Every convolution of `network` for one image (3, height, width), in the order in which they run.

    `network` is on the meta device and in eval mode. Transposed convolutions are not listed. A batch norm, an
    addition and an activation belong to a convolution if nothing else takes what is between; an addition
    belongs to the branch that runs last, as its other operand must be there before.
    """
    x = torch.empty(1, 3, *image, device="meta")
    recorder = _Recorder(x)
    with torch.no_grad(), recorder:
        network(x)
    return [
        _layer(operation)
        for operation in recorder.operations
        if operation.name == "convolution" and not operation.arguments[6]
    ]


def distinct(layers: Iterable[Layer]) -> list[Layer]:
    """Each different layer once, in the order of first appearance, with how often it was there in `uses`."""
    return [replace(layer, uses=count) for layer, count in Counter(layers).items()]


def _layer(convolution: Operation) -> Layer:
    x, weight, bias, stride, padding, dilation, _, _, groups = convolution.arguments
    norm, act, residual = _what_follows(convolution)
    return Layer(
        cin=x.shape[1],
        cout=weight.shape[0],
        kh=weight.shape[2],
        kw=weight.shape[3],
        stride_h=stride[0],
        stride_w=stride[-1],
        pad_h=padding[0],
        pad_w=padding[-1],
        dil_h=dilation[0],
        dil_w=dilation[-1],
        groups=groups,
        h=x.shape[2],
        w=x.shape[3],
        norm=norm,
        act=act,
        residual=residual,
        conv_bias=bias is not None,
        uses=1,
        models=1,
        role="",
    )


def _what_follows(convolution: Operation) -> tuple[str, str, str]:
    """Norm, activation and residual as the csv names them."""
    norm, residual, last = "none", "none", convolution
    following = last.only_consumer
    if following is not None and "batch_norm" in following.name:
        norm, last = "BatchNorm2d", following
    if _adds_what_is_there(last, convolution):
        residual, last = "add_act", last.consumers[0]
    act = last.only_consumer.activation if last.only_consumer is not None else None
    if act is not None and residual == "none" and _adds_what_is_there(last.consumers[0], convolution):
        residual = "act_add"
    return norm, act or "none", residual


def _adds_what_is_there(last: Operation, convolution: Operation) -> bool:
    """Whether only an addition takes the result `last`, and what it adds was made before `convolution`."""
    following = last.only_consumer
    if following is None or following.name != "add" or len(following.sources) != 2:
        return False
    (other,) = [source for source in following.sources if source is not last] or [last]
    return other.index < convolution.index and other.shape == last.shape == following.shape
