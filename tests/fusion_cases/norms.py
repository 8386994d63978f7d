"""Norms in every state and order, and what stands between a convolution and its norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import NORMED, WHOLE, Group, TwoGroups, add, case, conv


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
    add(f"norm_{_name}", partial(WithNorm, _norm), fused={"conv": WHOLE})

for _name, _norm, _reason in (
    ("no_statistics", partial(nn.BatchNorm2d, track_running_stats=False), r"statistics|running"),
    ("group", lambda c: nn.GroupNorm(2, c), r"GroupNorm"),
    ("instance", nn.InstanceNorm2d, r"InstanceNorm"),
    ("overridden", HalvingNorm, r"HalvingNorm|norm"),
):
    add(f"norm_{_name}", partial(WithNorm, _norm), unfused={"conv": _reason})

add("norm_subclass", partial(WithNorm, RenamedNorm))
add("norm_frozen_by_hand", partial(WithNorm, HandFrozen), fused={"conv": WHOLE})
add("norm_none", partial(WithNorm, lambda c: nn.Identity()), fused={"conv": "conv + relu"})
add(
    "norm_in_training_mode",
    Group,
    unfused={"conv": r"(?i)train"},
    prepare=lambda network: network.norm.train(),
)
add(
    "cumulative_norm_in_training_mode",
    partial(WithNorm, partial(nn.BatchNorm2d, momentum=None)),
    unfused={"conv": r"(?i)train"},
    prepare=lambda network: network.norm.train(),
)


@case(prepare=lambda network: setattr(network, "training", True))
class OnlyTheRootInTrainingMode(Group):
    """All submodules are in eval mode."""


@case(prepare=lambda network: network.train() and network.norm.eval())
class OnlyTheNormInEvalMode(Group):
    """The usual way to freeze norms while the rest trains."""


@case(fused={"conv": NORMED})
class Multiplied(Group):
    """Between the norm and the activation there is a product."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) * -1.5)


@case(unfused={"conv": r""})
class NormFirst(Group):
    """Pre-activation order: norm, activation, convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.norm(x)))


@case(fused={"conv": WHOLE}, unfused={"conv2": r""})
class NormFirstTwice(TwoGroups):
    """A pre-activation block: the first norm belongs to nobody, the second to the first convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.act(self.norm2(x)))
        return self.conv2(self.act(self.norm(y)))


@case(fused={"conv": "conv + relu"})
class NormAfterTheActivation(Group):
    """conv, act, norm: the norm cannot be folded into the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))


@case(fused={"conv": WHOLE})
class TwoActivations(Group):
    """Only the first of two activations belongs to the group."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.act(self.norm(self.conv(x))))


@case(fused={"conv": NORMED})
class TwoNorms(TwoGroups):
    """Only the first of two norms belongs to the group."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.norm(self.conv(x))))


@case(fused={"conv": NORMED})
class NoActivation(Group):
    """A linear projection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@case()
class ConvAlone(nn.Module):
    """Nothing to fuse with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@case(fused={"conv": NORMED}, unfused={"conv2": r""})
class TwoConvsInARow(TwoGroups):
    """A convolution on a convolution: the norm belongs to the second."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv2(x)))

    def __init__(self) -> None:
        super().__init__()
        del self.norm2


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
        add(
            f"{_label}_in_training_mode",
            lambda make=_make, module=_module: make(module(0.5)),
            prepare=drops,
        )


@case(prepare=lambda network: network.to(memory_format=torch.channels_last))
class FunctionalDropout(Group):
    """`F.dropout` is in training mode unless told otherwise: random even in an eval network."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.dropout(self.norm(self.conv(x)), 0.5))


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


add("functional_norm", FunctionalNorm, fused={"conv": WHOLE})


@case(fused={"conv": WHOLE})
class FunctionalNormByKeywords(FunctionalNorm):
    """Keywords, in another order than the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(
            F.batch_norm(
                input=y, eps=0.2, running_var=self.running_var, running_mean=self.running_mean, bias=self.bias
            )
        )


@case()
class FunctionalNormInTrainingMode(FunctionalNorm):
    """Statistics of the batch, and the running ones move."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3))


@case()
class FunctionalNormOfOtherStatistics(FunctionalNorm):
    """Statistics computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(F.batch_norm(y, x.mean((0, 2, 3)), x.var((0, 2, 3)) + 0.1, self.weight, self.bias))


@case(unused_norms=("norm",))
class NormWithScaledWeight(Group):
    """The norm's own tensors, used by a function and scaled."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight * 2, norm.bias)
        return self.act(y)


@case(unused_norms=("norm",))
class NormOfTheNormsTensors(Group):
    """The norm module's tensors by a function, with another eps than the module's."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=0.5)
        return self.act(y)


@case(prepare=lambda network: network.norm.float())
class NormInAnotherPrecision(Group):
    """A norm between two conversions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x).float()).double())
