"""Convolutions that are not quite one, weights that are computed, and other operators that look alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.fusion_cases.case import NORMED, WHOLE, Group, add, add_net, case, conv


class WithConv(Group):
    """A convolution of another kind in the usual place."""

    def __init__(self, layer: Any = None, norm: Any = None) -> None:
        super().__init__()
        self.conv = conv() if layer is None else layer()
        if norm is not None:
            self.norm = norm()


class Standardised(nn.Conv2d):
    """Computes its weight in every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Rescaled(nn.Conv2d):
    """Overrides the method that `forward` calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 0.5, bias)


class Initialised(nn.Conv2d):
    """A subclass that changes nothing but the initial values."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.3)
        if self.bias is not None:
            nn.init.ones_(self.bias)


class Called(nn.Conv2d):
    """A subclass that overrides `__call__`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **options) + 1


class DoublingWeight(nn.Conv2d):
    """`weight` is a property of the class, computed from a parameter of another name."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.raw = nn.Parameter(self._parameters.pop("weight").detach() * 0.5)

    @property
    def weight(self) -> Tensor:
        return self.raw * 2

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight_", None) if value is None else None


for _class in (Standardised, Rescaled, Called):
    add(
        f"conv_{_class.__name__.lower()}",
        partial(WithConv, partial(_class, 4, 4, 3, padding=1)),
        unfused={"conv": rf"(?i){_class.__name__}|forward|subclass|own|class"},
    )
add("conv_initialised", partial(WithConv, partial(Initialised, 4, 4, 3, padding=1)))


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def prune_in_place(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


PARAMETRIZED: dict[str, Any] = {
    "halved": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", Halved()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": prune_in_place,
}


def parametrized(change: Any, part: str) -> nn.Module:
    network = WithConv()
    with torch.no_grad():  # otherwise some leave a weight behind that no copy can be made of
        change(getattr(network, part))
    return network


for _name, _change in PARAMETRIZED.items():
    add(
        f"parametrized_{_name}",
        partial(parametrized, _change, "conv"),
        unfused=r"(?i)parametri|hook|computed|weight",
    )
add("parametrized_norm", partial(parametrized, PARAMETRIZED["halved"], "norm"), unfused=r"(?i)parametri|norm")


def with_forward(part: str) -> nn.Module:
    network = Group()
    layer = getattr(network, part)
    layer.forward = partial(shifted, type(layer).forward, layer)
    return network


def shifted(forward: Any, layer: nn.Module, x: Tensor) -> Tensor:
    return forward(layer, x) + 0.5


for _part in ("conv", "norm"):
    add(f"forward_set_on_the_{_part}", partial(with_forward, _part), unfused=r"(?i)forward")
add("forward_set_on_the_act", partial(with_forward, "act"), fused=NORMED)


def weight_as_buffer() -> nn.Module:
    network = Group()
    weight = network.conv.weight.detach()
    del network.conv.weight
    network.conv.register_buffer("weight", weight)
    return network


add("weight_is_a_buffer", weight_as_buffer)


@case()
def computed_weight(self: Any, x: Tensor) -> Tensor:
    """A functional convolution whose weight is computed from the module's."""
    weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
    return self.act(self.norm(F.conv2d(x, weight, self.conv.bias, padding=1)))


@case()
def weight_from_the_input(self: Any, x: Tensor) -> Tensor:
    """A hypernetwork: the weight depends on the image."""
    weight = self.conv.weight * x.mean((0, 2, 3)).reshape(1, -1, 1, 1)
    return self.act(self.norm(F.conv2d(x, weight, self.conv.bias, padding=1)))


add_net(
    "weight_as_input",
    lambda self, x, weight: self.act(self.norm(F.conv2d(x, weight, self.conv.bias, padding=1))),
    inputs=lambda draw: (draw.image(), draw.tensor(4, 4, 3, 3, salt=1)),
)


@case()
def weight_scaled_in_forward(self: Any, x: Tensor) -> Tensor:
    """Forward changes the weight in place before using it."""
    self.conv.weight.data.mul_(0.9)
    return self.first(x)


@case()
def weight_scaled_after_use(self: Any, x: Tensor) -> Tensor:
    """Between the convolution and the norm."""
    y = self.conv(x)
    with torch.no_grad():
        self.conv.weight.mul_(0.9)
    return self.act(self.norm(y))


class Functional(nn.Module):
    """A functional convolution on parameters of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv().weight.detach())
        self.bias = nn.Parameter(torch.linspace(-1, 1, 4))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias, padding=1)))


add("functional_conv", Functional)


@case(Functional)
def functional_by_keywords(self: Any, x: Tensor) -> Tensor:
    """Keywords in another order, a padding in words, a stride of two numbers."""
    y = torch.conv2d(weight=self.weight, input=x, padding="same", dilation=(2, 1))
    return F.relu(self.norm(y + self.bias.reshape(1, -1, 1, 1)))


@case(Functional)
def functional_below_torch(self: Any, x: Tensor) -> Tensor:
    y = torch.ops.aten.convolution(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return F.relu(self.norm(y))


add_net("modules_forward_called", lambda self, x: self.act.forward(self.norm.forward(self.conv.forward(x))))
# The module's tensors, without the module.
add_net(
    "modules_tensors",
    lambda self, x: self.act(self.norm(F.conv2d(x, self.conv.weight, None, self.conv.stride, 2, 2))),
)


def transposed() -> nn.Module:
    return WithConv(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1))


add("transposed", transposed)


class Volumes(nn.Module):
    """Three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Sequences(nn.Module):
    """One dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


add("three_dimensions", Volumes, inputs=lambda draw: (draw.image()[:, :, None].repeat(1, 1, 3, 1, 1),))
add("one_dimension", Sequences, inputs=lambda draw: (draw.image().flatten(2),))
# A decoder: the plain convolution is fused, the transposed one is not.
add_net(
    "transposed_and_plain",
    lambda self, x: F.relu(self.norm(self.conv(F.relu(self.up_norm(self.up(x)))))),
    nn.Module,
    {
        "up": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
        "up_norm": lambda: nn.BatchNorm2d(4),
        "conv": conv,
        "norm": lambda: nn.BatchNorm2d(4),
    },
)


@case(Group, {"linear": lambda: nn.Linear(4, 4)})
def unfolded(self: Any, x: Tensor) -> Tensor:
    """A linear layer between convolution and norm."""
    y = self.linear(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return self.act(self.norm(y))


for _dtype, _tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
    add(f"in_{str(_dtype).removeprefix('torch.')}", Group, fused=WHOLE, dtype=_dtype, tolerance=_tolerance)
add(
    "half_with_float32_norm",
    Group,
    fused=WHOLE,
    dtype=torch.bfloat16,
    tolerance=4e-2,
    prepare=lambda network: network.norm.float(),
)
add(
    "channels_last", Group, fused=WHOLE, prepare=lambda network: network.to(memory_format=torch.channels_last)
)
