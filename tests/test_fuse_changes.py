"""A fused network is an object that its owner changes: no graph must outlive what it was made of."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import assert_equal_answers, assert_same, every_freeze, image, randomise
from tests.zoo.fused_calls import counted_frozen, recorded


class Changeable(nn.Module):
    """One group, and all that code may read to decide what becomes of its result."""

    of_class = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.own_conv, self.own_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.named = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})
        self.factors = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.swish = Swish()
        self.register_module("down", None)
        self.register_parameter("shift", None)
        self.sized = nn.Parameter(torch.ones(5))
        self.public, self._private = 1.5, 0.5
        self.settings = {"scale": 2.0, "more": [1.0]}
        self.config = types.SimpleNamespace(scale=2.0)

    def post(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.act(self.norm(self.conv(x))))
        for layer in (*self.layers, *self.named.values()):
            x = layer(x)
        for factor in self.factors:
            x = x * factor
        conv, norm = self.own_conv, self.own_norm
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        x = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, norm.eps
        )
        x = x * self.public * self._private * self.of_class * self.sized.shape[0]
        x = x * self.settings["scale"] * self.settings["more"][0] * self.config.scale
        x = F.dropout(x if self.shift is None else x + self.shift, 0.5, self.swish.training)
        return self.post(x if self.down is None else self.down(x))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Softsign(Swish):
    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(x)


def step(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(network.parameters(), 0.5).step()


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda net: setattr(net, "public", 3.0),
    "private attribute": lambda net: setattr(net, "_private", 3.0),
    "over an attribute of the class": lambda net: setattr(net, "of_class", 3.0),
    "method of the instance": lambda net: setattr(net, "post", lambda x: 5 * x),
    "forward of the instance": lambda net: setattr(net, "forward", lambda x: x * 2),
    "forward of a layer": lambda net: setattr(net.norm, "forward", lambda input: input * 2),
    "dict": lambda net: net.settings.update(scale=3.0),
    "list in a dict": lambda net: net.settings["more"].__setitem__(0, 3.0),
    "object": lambda net: setattr(net.config, "scale", 3.0),
    "module list": lambda net: net.layers.append(nn.Tanh()),
    "module dict": lambda net: net.named.update({"b": nn.Tanh()}),
    "parameter list": lambda net: net.factors.append(nn.Parameter(torch.full((1,), 3.0))),
    "conv": lambda net: setattr(net, "conv", nn.Conv2d(4, 4, 1, bias=False).double()),
    "norm": lambda net: setattr(net, "norm", nn.GroupNorm(2, 4).double()),
    "act": lambda net: setattr(net, "act", nn.Tanh()),
    "module without leaves": lambda net: setattr(net, "swish", nn.Tanh().eval()),
    "class of a module": lambda net: setattr(net.swish, "__class__", Softsign),
    "class of a layer": lambda net: setattr(net.act, "__class__", nn.Tanh),
    "module that was None": lambda net: setattr(net, "down", nn.Tanh()),
    "parameter that was None": lambda net: setattr(net, "shift", nn.Parameter(torch.ones(1))),
    "shape of a parameter": lambda net: setattr(net, "sized", nn.Parameter(torch.ones(7))),
    "eps": lambda net: setattr(net.norm, "eps", 0.6),
    "eps that is only read": lambda net: setattr(net.own_norm, "eps", 0.7),
    "stride": lambda net: setattr(net.conv, "stride", (2, 2)),
    "padding": lambda net: setattr(net.conv, "padding", (0, 0)),
    "stride that is only read": lambda net: setattr(net.own_conv, "stride", (2, 2)),
    "mode": lambda net: net.norm.train(),
    "mode that is only read": lambda net: net.own_norm.train(),
    "mode of a part": lambda net: net.swish.train(),
    "no statistics": lambda net: [setattr(net.norm, f"running_{name}", None) for name in ("mean", "var")],
    "no bias": lambda net: setattr(net.norm, "bias", None),
    "parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.conv).weight,
    "in place": lambda net: net.conv.weight.mul_(2),
    "statistics": lambda net: net.norm.running_var.mul_(4),
    "buffer": lambda net: setattr(net.norm, "running_mean", net.norm.running_mean + 1),
    "parameter": lambda net: setattr(net.conv, "weight", nn.Parameter(net.conv.weight.detach() * 0.5)),
    "checkpoint": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
    "optimizer": lambda net: step(net),
    "data": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data * 3),
    "data in place": lambda net: net.norm.weight.data.copy_(torch.linspace(1, 2, 4)),
}
# A snapshot sees what can be seen, which these cannot.
HIDDEN = ("data", "data in place")
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda network: network,
    # A pickle is made by the same method.
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("change", CHANGES)
@every_freeze
def test_a_change_is_seen(change: str, copied: Callable[[nn.Module], nn.Module], freeze: bool) -> None:
    torch.manual_seed(0)
    plain = Changeable().eval()
    randomise(plain)
    fused = copied(fused_cna.fuse(plain.double(), freeze=freeze))
    assert_equal_answers(fused, plain)
    with torch.no_grad(), recorded(fused) as calls, counted_frozen() as frozen:
        before = fused(image())
    assert len(frozen if freeze else calls) > 0
    results = []
    for one in (plain, fused):
        torch.manual_seed(3)
        with torch.no_grad():
            CHANGES[change](one)
            results.append(one(image()))
    expected, actual = results
    if change != "parametrization":
        assert before.shape != expected.shape or not torch.allclose(before, expected)
    if not (freeze and change in HIDDEN and torch.equal(actual, before)):
        assert_same(actual, expected, 1e-9)
