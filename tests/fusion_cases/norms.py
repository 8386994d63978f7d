"""Norms in every state and order, and what stands between a convolution and its norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import NORMED, WHOLE, Group, TwoGroups, add, add_net, case, conv


class WithNorm(Group):
    """A norm of another kind in the usual place."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm(4)


class HalvingNorm(nn.BatchNorm2d):
    """A subclass with a `forward` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class RenamedNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class HandFrozen(nn.Module):
    """A frozen batch norm as detectors write it by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def without_bias(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.bias = None  # type: ignore[assignment]
    return norm


for _name, _norm in {
    "batch_norm": nn.BatchNorm2d,
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "no_affine": partial(nn.BatchNorm2d, affine=False),
    "large_eps": partial(nn.BatchNorm2d, eps=0.4),
    "without_bias": without_bias,
    "sync": nn.SyncBatchNorm,
}.items():
    add(f"norm_{_name}", partial(WithNorm, _norm), fused=WHOLE)

for _name, _norm, _reason in (
    ("no_statistics", partial(nn.BatchNorm2d, track_running_stats=False), r"statistics|running"),
    ("group", lambda c: nn.GroupNorm(2, c), r"GroupNorm"),
    ("instance", nn.InstanceNorm2d, r"InstanceNorm"),
    ("overridden", HalvingNorm, r"HalvingNorm|norm"),
):
    add(f"norm_{_name}", partial(WithNorm, _norm), unfused=_reason)

add("norm_subclass", partial(WithNorm, RenamedNorm))
add("norm_frozen_by_hand", partial(WithNorm, HandFrozen), fused=WHOLE)
add("norm_none", partial(WithNorm, lambda c: nn.Identity()), fused="conv + relu")
add("norm_in_training_mode", Group, unfused=r"(?i)train", prepare=lambda network: network.norm.train())
add(
    "cumulative_norm_in_training_mode",
    partial(WithNorm, partial(nn.BatchNorm2d, momentum=None)),
    unfused=r"(?i)train",
    prepare=lambda network: network.norm.train(),
)
add("only_the_root_in_training_mode", Group, prepare=lambda network: setattr(network, "training", True))
# The usual way to freeze norms while the rest trains.
add("only_the_norm_in_eval_mode", Group, prepare=lambda network: network.train() and network.norm.eval())
# Between the norm and the activation there is a product.
add_net("multiplied", lambda self, x: self.act(self.norm(self.conv(x)) * -1.5), fused=NORMED)
# Pre-activation order: norm, activation, convolution.
add_net("norm_first", lambda self, x: self.conv(self.act(self.norm(x))), unfused=r"")


@case(TwoGroups, fused=WHOLE, unfused={"conv2": r""})
def norm_first_twice(self: Any, x: Tensor) -> Tensor:
    """A pre-activation block: the first norm belongs to nobody, the second to the first convolution."""
    y = self.conv(self.act(self.norm2(x)))
    return self.conv2(self.act(self.norm(y)))


# conv, act, norm: the norm cannot be folded into the convolution.
add_net("norm_after_the_activation", lambda self, x: self.norm(self.act(self.conv(x))), fused="conv + relu")
# Only the first of two activations belongs to the group.
add_net("two_activations", lambda self, x: torch.sigmoid(self.first(x)), fused=WHOLE)
# Only the first of two norms belongs to the group.
add_net("two_norms", lambda self, x: self.act(self.norm2(self.norm(self.conv(x)))), TwoGroups, fused=NORMED)
add_net("no_activation", lambda self, x: self.norm(self.conv(x)), fused=NORMED)
add_net("conv_alone", lambda self, x: self.conv(x), nn.Module, {"conv": conv})
# A convolution on a convolution: the norm belongs to the second.
add_net(
    "two_convs_in_a_row",
    lambda self, x: self.norm(self.conv(self.conv2(x))),
    TwoGroups,
    {"norm2": None},
    fused=NORMED,
    unfused={"conv2": r""},
)


class Between(Group):
    """Something between the convolution and the norm."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.between(self.conv(x))))


class BeforeTheActivation(Between):
    """Something between the norm and the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.between(self.norm(self.conv(x))))


def drops(network: Any) -> None:
    """Dropout in training mode; which values fall depends on the order they have in memory."""
    network.to(memory_format=torch.channels_last).between.train()


class Flip(nn.Module):
    """Channels in reverse order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


for _name, _module in {
    "pad": partial(nn.ZeroPad2d, 1),
    "pool": partial(nn.AvgPool2d, 2),
    "upsampling": partial(nn.Upsample, scale_factor=2, mode="bilinear"),
    "flip": Flip,
    "shuffle": partial(nn.ChannelShuffle, 2),
    "sigmoid": nn.Sigmoid,
}.items():
    add(f"between_conv_and_norm_{_name}", lambda module=_module: Between(module()))
    add(
        f"between_norm_and_activation_{_name}",
        lambda module=_module: BeforeTheActivation(module()),
        **({} if _name == "sigmoid" else {"fused": {"conv": NORMED}}),
    )
for _name, _make in {"conv_and_norm": Between, "norm_and_activation": BeforeTheActivation}.items():
    for _module in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout):
        _label = f"between_{_name}_{_module.__name__.lower()}"
        add(f"{_label}_in_eval_mode", lambda make=_make, module=_module: make(module(0.5)))
        add(f"{_label}_in_training_mode", lambda make=_make, module=_module: make(module(0.5)), prepare=drops)


# `F.dropout` is in training mode unless told otherwise: random even in an eval network.
add_net(
    "functional_dropout",
    lambda self, x: self.act(F.dropout(self.norm(self.conv(x)), 0.5)),
    prepare=lambda network: network.to(memory_format=torch.channels_last),
)


class FunctionalNorm(nn.Module):
    """A convolution module and `F.batch_norm` with parameters of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(
            F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 0.2)
        )


add("functional_norm", FunctionalNorm, fused=WHOLE)


@case(FunctionalNorm, fused=WHOLE)
def functional_norm_by_keywords(self: Any, x: Tensor) -> Tensor:
    """Keywords, in another order than the parameters."""
    y = self.conv(x)
    return F.relu(
        F.batch_norm(
            input=y, eps=0.2, running_var=self.running_var, running_mean=self.running_mean, bias=self.bias
        )
    )


@case(FunctionalNorm)
def functional_norm_in_training_mode(self: Any, x: Tensor) -> Tensor:
    """Statistics of the batch, and the running ones move."""
    y = self.conv(x)
    return F.relu(F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3))


@case(FunctionalNorm)
def functional_norm_of_other_statistics(self: Any, x: Tensor) -> Tensor:
    """Statistics computed from the input."""
    y = self.conv(x)
    return F.relu(F.batch_norm(y, x.mean((0, 2, 3)), x.var((0, 2, 3)) + 0.1, self.weight, self.bias))


@case()
def norm_with_scaled_weight(self: Any, x: Tensor) -> Tensor:
    """The norm's own tensors, used by a function and scaled."""
    norm = self.norm
    y = F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight * 2, norm.bias)
    return self.act(y)


@case()
def norm_of_the_norms_tensors(self: Any, x: Tensor) -> Tensor:
    """The norm module's tensors by a function, with another eps than the module's."""
    norm = self.norm
    y = F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.5)
    return self.act(y)


add_net(
    "norm_in_another_precision",
    lambda self, x: self.act(self.norm(self.conv(x).float()).double()),
    prepare=lambda network: network.norm.float(),
)
