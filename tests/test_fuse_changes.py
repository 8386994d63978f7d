"""Fused networks whose owner goes on changing them: values, layers, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases import DRAWS, Group, assert_same, randomise
from tests.fusion_cases.sums import chain

TOLERANCE = 1e-10


def image(seed: int = 0) -> Tensor:
    return DRAWS[seed].image()


def assert_equal_answers(fused: nn.Module, plain: nn.Module) -> None:
    for seed in (0, 1):
        with torch.no_grad():
            assert_same(fused(image(seed)), plain(image(seed)), TOLERANCE)


CHANGES: dict[str, Callable[[nn.Conv2d, nn.BatchNorm2d], object]] = {
    "in_place": lambda conv, norm: conv.weight.data.mul_(2),
    "copy": lambda conv, norm: norm.weight.data.copy_(torch.linspace(1, 2, 4)),
    "data": lambda conv, norm: setattr(conv.weight, "data", conv.weight.data * 3),
    "statistics": lambda conv, norm: norm.running_var.mul_(4),
    "buffer": lambda conv, norm: setattr(norm, "running_mean", norm.running_mean + 1),
    "parameter": lambda conv, norm: setattr(conv, "weight", nn.Parameter(conv.weight.detach() * 0.5)),
    "no_bias": lambda conv, norm: setattr(norm, "bias", None),
    "eps": lambda conv, norm: setattr(norm, "eps", 0.6),
    "norm_in_training_mode": lambda conv, norm: norm.train(),
    "norm_without_statistics": lambda conv, norm: (
        setattr(norm, "running_mean", None),
        setattr(norm, "running_var", None),
    ),
    "stride_and_padding": lambda conv, norm: (
        setattr(conv, "padding", (0, 0)),
        setattr(conv, "dilation", (1, 1)),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Callable[..., object]) -> None:
    plain = chain()
    fused = fused_cna.fuse(plain)
    assert_equal_answers(fused, plain)
    with torch.no_grad():
        for network in (fused, plain):
            change(network.body.conv, network.body.norm)
    assert_equal_answers(fused, plain)


REPLACED: dict[str, Callable[[Any], object]] = {
    "conv": lambda network: setattr(network.body, "conv", nn.Conv2d(4, 4, 1, bias=False).double()),
    "norm": lambda network: setattr(network.body, "norm", nn.GroupNorm(2, 4).double()),
    "act": lambda network: setattr(network.body, "act", nn.Tanh()),
    "body": lambda network: setattr(network, "body", Group().double().eval()),
    "flag": lambda network: setattr(network, "use_act", False),
    "number": lambda network: setattr(network, "scale", 2.5),
    "forward": lambda network: setattr(network.body.norm, "forward", lambda input: input * 2),
    "forward_of_the_root": lambda network: setattr(network, "forward", lambda x: x * 2),
    "class_of_a_layer": lambda network: setattr(network.body.act, "__class__", nn.Tanh),
    "parametrization": lambda network: nn.utils.parametrizations.weight_norm(network.body.conv),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_replaced_parts_are_seen(change: Callable[[Any], object]) -> None:
    """A network is an object that its owner changes; what was fused must not outlive its parts."""
    plain = chain()
    fused = fused_cna.fuse(plain)
    assert_equal_answers(fused, plain)
    for network in (fused, plain):
        torch.manual_seed(3)
        change(network)
    assert_equal_answers(fused, plain)


def test_other_methods_work() -> None:
    plain = chain()
    fused = fused_cna.fuse(plain)
    with torch.no_grad():
        assert_same(fused.features(image()), plain.features(image()), TOLERANCE)
        assert_same(fused.body(image()), plain.body(image()), TOLERANCE)
        fused.scale = 3.0
        assert fused.scale == 3.0


def test_dropout_in_a_part_set_to_training() -> None:
    """`F.dropout(x, p, self.training)` follows the part's own mode, whatever the root's."""

    class Dropping(Group):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    plain = nn.Sequential(Group(), Dropping())
    randomise(plain)
    # Which values fall depends on the order that they have in memory.
    plain.to(memory_format=torch.channels_last)
    fused = fused_cna.fuse(plain.double().eval())
    assert_equal_answers(fused, plain)
    for network in (fused, plain):
        network[1].training = True
    results = []
    for network in (fused, plain):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(network(image()))
    assert_same(results[0], results[1], TOLERANCE)
