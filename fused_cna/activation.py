"""The activations that can be fused: operator name, ``nn.Module`` class and eager function, in one table."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """One row of the table."""

    module: type[nn.Module]
    """Its class, matched exactly: a subclass may compute something else."""
    function: Callable[..., Tensor]
    """``function(x, *act_params, inplace)``; ``inplace`` permits it to overwrite ``x``."""
    params: tuple[str, ...] = ()
    """The attributes of the module that are its ``act_params``, in order."""
    matches: Callable[[Any], bool] | None = None
    """Tells apart activations that share a class, by the module's present attributes."""


def _identity(x: Tensor, inplace: bool) -> Tensor:
    return x


def _gelu(x: Tensor, inplace: bool) -> Tensor:
    return F.gelu(x)


def _gelu_tanh(x: Tensor, inplace: bool) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _sigmoid(x: Tensor, inplace: bool) -> Tensor:
    return torch.sigmoid_(x) if inplace else torch.sigmoid(x)


def _tanh(x: Tensor, inplace: bool) -> Tensor:
    return torch.tanh_(x) if inplace else torch.tanh(x)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(nn.Identity, _identity),
    "relu": Activation(nn.ReLU, F.relu),
    "relu6": Activation(nn.ReLU6, F.relu6, matches=lambda act: act.min_val == 0 and act.max_val == 6),
    "leaky_relu": Activation(nn.LeakyReLU, F.leaky_relu, params=("negative_slope",)),
    "elu": Activation(nn.ELU, F.elu, params=("alpha",)),
    "silu": Activation(nn.SiLU, F.silu),
    "gelu": Activation(nn.GELU, _gelu, matches=lambda act: act.approximate == "none"),
    "gelu_tanh": Activation(nn.GELU, _gelu_tanh, matches=lambda act: act.approximate == "tanh"),
    "hardswish": Activation(nn.Hardswish, F.hardswish),
    "hardsigmoid": Activation(nn.Hardsigmoid, F.hardsigmoid),
    "sigmoid": Activation(nn.Sigmoid, _sigmoid),
    "tanh": Activation(nn.Tanh, _tanh),
    "mish": Activation(nn.Mish, F.mish),
}

_BY_MODULE: dict[type[nn.Module], list[tuple[str, Activation]]] = {}
for _name, _row in ACTIVATIONS.items():
    _BY_MODULE.setdefault(_row.module, []).append((_name, _row))


def describe(act: nn.Module) -> tuple[str, tuple[float, ...]] | None:
    """The operator's ``act`` and ``act_params`` for a module as it is now; None if it is not in the table."""
    for name, row in _BY_MODULE.get(type(act), ()):
        if row.matches is None or row.matches(act):
            return name, tuple([getattr(act, param) for param in row.params]) if row.params else ()
    return None


def apply(x: Tensor, act: str, act_params: Sequence[float], inplace: bool = False) -> Tensor:
    """The activation by its operator name, in plain PyTorch; ``inplace`` permits it to overwrite ``x``."""
    return ACTIVATIONS[act].function(x, *act_params, inplace)
