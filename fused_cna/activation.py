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
    others: tuple[str, ...] = ()
    """More classes that compute it, by module and name: their libraries need not be installed."""


_TIMM = "timm.layers.activations."
_TIMM_ME = "timm.layers.activations_me."


def _is_relu6(act: Any) -> bool:
    return bool(act.min_val == 0 and act.max_val == 6)


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
    "relu6": Activation(
        nn.ReLU6, F.relu6, matches=_is_relu6, others=("torch.nn.modules.activation.Hardtanh",)
    ),
    "leaky_relu": Activation(nn.LeakyReLU, F.leaky_relu, params=("negative_slope",)),
    "elu": Activation(nn.ELU, F.elu, params=("alpha",)),
    "silu": Activation(nn.SiLU, F.silu, others=(_TIMM + "Swish", _TIMM_ME + "SwishMe")),
    "gelu": Activation(nn.GELU, _gelu, matches=lambda act: act.approximate == "none"),
    "gelu_tanh": Activation(nn.GELU, _gelu_tanh, matches=lambda act: act.approximate == "tanh"),
    "hardswish": Activation(
        nn.Hardswish, F.hardswish, others=(_TIMM + "HardSwish", _TIMM_ME + "HardSwishMe")
    ),
    "hardsigmoid": Activation(
        nn.Hardsigmoid, F.hardsigmoid, others=(_TIMM + "HardSigmoid", _TIMM_ME + "HardSigmoidMe")
    ),
    "sigmoid": Activation(nn.Sigmoid, _sigmoid, others=(_TIMM + "Sigmoid",)),
    "tanh": Activation(nn.Tanh, _tanh, others=(_TIMM + "Tanh",)),
    "mish": Activation(nn.Mish, F.mish, others=(_TIMM + "Mish", _TIMM_ME + "MishMe")),
}

# timm's GELU modules have no `approximate`: which one it is, the class says.
_BY_NAME = {name: act for act, row in ACTIVATIONS.items() for name in row.others} | {
    _TIMM + "GELU": "gelu",
    _TIMM + "GELUTanh": "gelu_tanh",
}

_BY_MODULE: dict[type[nn.Module], list[tuple[str, Activation]]] = {}
for _name, _row in ACTIVATIONS.items():
    _BY_MODULE.setdefault(_row.module, []).append((_name, _row))


ATTRIBUTES = (
    *{name: None for row in ACTIVATIONS.values() for name in row.params},
    "min_val",
    "max_val",
    "approximate",
)
"""All attributes of an activation that :func:`describe` may read."""


def describe(act: nn.Module) -> tuple[str, tuple[float, ...]] | None:
    """The operator's ``act`` and ``act_params`` for a module as it is now; None if it is not in the table."""
    kind = type(act)
    if kind in _BY_MODULE:
        for name, row in _BY_MODULE[kind]:
            if row.matches is None or row.matches(act):
                return name, tuple([getattr(act, param) for param in row.params]) if row.params else ()
        return None
    other = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if other is None or (other == "relu6" and not _is_relu6(act)):
        return None
    return other, ()


def apply(x: Tensor, act: str, act_params: Sequence[float], inplace: bool = False) -> Tensor:
    """The activation by its operator name, in plain PyTorch; ``inplace`` permits it to overwrite ``x``."""
    return ACTIVATIONS[act].function(x, *act_params, inplace)
