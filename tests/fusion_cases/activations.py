"""Activations in every spelling, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import NORMED, Group, add


class WithModule(Group):
    """An activation module."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.act = act()


class WithFunction(Group):
    """An activation as a function or method."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm(self.conv(x)))


class Negated(nn.ReLU):
    """A subclass with a `forward` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Halved(nn.Hardtanh):
    """Looks like ReLU6 by its attributes."""

    def __init__(self) -> None:
        super().__init__(0.0, 6.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (nn.ReLU, "relu"),
    "relu_in_place": (partial(nn.ReLU, True), "relu"),
    "relu6": (nn.ReLU6, "relu6"),
    "hardtanh_as_relu6": (partial(nn.Hardtanh, 0.0, 6.0), "relu6"),
    "leaky_relu": (partial(nn.LeakyReLU, 0.3), "leaky_relu"),
    "leaky_relu_in_place": (partial(nn.LeakyReLU, -0.2, True), "leaky_relu"),
    "elu": (partial(nn.ELU, 0.4), "elu"),
    "silu": (nn.SiLU, "silu"),
    "gelu": (nn.GELU, "gelu"),
    "gelu_tanh": (partial(nn.GELU, "tanh"), "gelu_tanh"),
    "hardswish": (partial(nn.Hardswish, True), "hardswish"),
    "hardsigmoid": (nn.Hardsigmoid, "hardsigmoid"),
    "sigmoid": (nn.Sigmoid, "sigmoid"),
    "tanh": (nn.Tanh, "tanh"),
    "mish": (nn.Mish, "mish"),
    "identity": (nn.Identity, ""),
    "hardtanh": (nn.Hardtanh, ""),
    "prelu": (partial(nn.PReLU, 4), ""),
    "softplus": (nn.Softplus, ""),
    "softmax": (nn.Softmax2d, ""),
    "celu": (partial(nn.CELU, 0.5), ""),
    "rrelu": (nn.RReLU, ""),
    "threshold": (partial(nn.Threshold, 0.1, 0.5), ""),
    "glu": (partial(nn.GLU, 1), ""),
}
for _name, (_make, _part) in MODULES.items():
    add(
        f"act_module_{_name}",
        lambda make=_make: WithModule(make),
        fused={"conv": f"{NORMED} + {_part}" if _part else NORMED},
    )

add("act_module_subclass", lambda: WithModule(Negated))
add("act_module_subclass_of_hardtanh", lambda: WithModule(Halved))

FUNCTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "relu": (F.relu, "relu"),
    "relu_in_place": (lambda z: F.relu(z, True), "relu"),
    "relu_underscore": (F.relu_, "relu"),
    "torch_relu": (torch.relu, "relu"),
    "torch_relu_underscore": (torch.relu_, "relu"),
    "relu_method": (lambda z: z.relu(), "relu"),
    "relu_method_underscore": (lambda z: z.relu_(), "relu"),
    "relu_by_keyword": (lambda z: F.relu(input=z, inplace=True), "relu"),
    "relu6": (lambda z: F.relu6(z, inplace=True), "relu6"),
    "hardtanh_as_relu6": (lambda z: F.hardtanh(z, 0, 6), "relu6"),
    "hardtanh_as_relu6_by_keyword": (
        lambda z: F.hardtanh(z, max_val=6.0, min_val=0.0, inplace=True),
        "relu6",
    ),
    "leaky_relu": (F.leaky_relu, "leaky_relu"),
    "leaky_relu_slope": (lambda z: F.leaky_relu(z, 0.3, True), "leaky_relu"),
    "leaky_relu_by_keyword": (lambda z: F.leaky_relu(z, negative_slope=0.4), "leaky_relu"),
    "elu": (lambda z: F.elu(z, 0.4, True), "elu"),
    "silu": (lambda z: F.silu(z, inplace=True), "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "hardswish": (F.hardswish, "hardswish"),
    "hardsigmoid": (lambda z: F.hardsigmoid(z, True), "hardsigmoid"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "sigmoid_method": (lambda z: z.sigmoid(), "sigmoid"),
    "sigmoid_method_underscore": (lambda z: z.sigmoid_(), "sigmoid"),
    "functional_sigmoid": (F.sigmoid, "sigmoid"),
    "tanh": (torch.tanh, "tanh"),
    "tanh_method_underscore": (lambda z: z.tanh_(), "tanh"),
    "functional_tanh": (F.tanh, "tanh"),
    "mish": (lambda z: F.mish(z, inplace=True), "mish"),
    "hardtanh": (lambda z: F.hardtanh(z, 0.0, 5.0), ""),
    "hardtanh_defaults": (F.hardtanh, ""),
    "negated": (lambda z: F.relu(-z), ""),
    "softmax": (lambda z: z.softmax(1), ""),
    "selu": (F.selu, ""),
    "prelu": (lambda z: F.prelu(z, z.new_full((1,), 0.3)), ""),
    "relu_of_a_slice": (lambda z: F.relu(z[:, 1:]), ""),
    "abs": (abs, ""),
}
for _name, (_function, _part) in FUNCTIONS.items():
    add(
        f"act_function_{_name}",
        lambda function=_function: WithFunction(function),
        fused={"conv": f"{NORMED} + {_part}" if _part else NORMED},
    )

# A fuser may know these as what they amount to, or leave them alone.
SPELLED_OUT: dict[str, Callable[[Any], Any]] = {
    "clamp_from_zero": lambda z: z.clamp(min=0),
    "clamp_to_six": lambda z: torch.clamp(z, 0, 6),
    "clamp_underscore": lambda z: z.clamp_(0, 6),
    "clamp_to_five": lambda z: torch.clamp(z, 0, 5),
    "clamp_max_only": lambda z: z.clamp(max=0.5),
    "clamp_by_tensors": lambda z: z.clamp(z.mean(), z.mean() + 0.5),
    "swish": lambda z: z * torch.sigmoid(z),
    "swish_with_slope": lambda z: z * torch.sigmoid(1.7 * z),
    "hard_swish": lambda z: z * F.relu6(z + 3) / 6,
    "threshold": lambda z: F.threshold(z, 0, 0),
    "where": lambda z: torch.where(z > 0, z, 0.1 * z),
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "log_sigmoid": F.logsigmoid,
    "normalize": lambda z: F.normalize(z, dim=1),
}
for _name, _function in SPELLED_OUT.items():
    add(f"act_spelled_out_{_name}", lambda function=_function: WithFunction(function))
