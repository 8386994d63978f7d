"""Modules, parameters and results that are used in more than one place, or in none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import (
    ADDED,
    ADDED_AFTER,
    NORMED,
    WHOLE,
    Group,
    TwoGroups,
    add,
    add_net,
    case,
    conv,
    net,
    two_images,
)

SHARED = r"(?i)twice|more than once|times|shared?|several|elsewhere|again|two|other|also|places"


# One convolution under two norms, each with a place of its own.
add_net(
    "shared_conv",
    lambda self, x: self.first(x) + self.act(self.norm2(self.conv(x * 0.5))),
    TwoGroups,
    fused=(WHOLE, ADDED_AFTER),
)
# One convolution, once under a norm and once without.
add_net(
    "shared_conv_once_bare", lambda self, x: self.first(x) + self.conv(x * 0.5), fused=(WHOLE, "conv + add")
)


add_net(
    "shared_conv_by_another_name",
    lambda self, x: self.first(x) + self.act(self.second(x * 0.5)),
    TwoGroups,
    fused=(WHOLE, ADDED_AFTER),
    prepare=lambda network: setattr(network, "conv2", network.conv),
)


add_net(
    "shared_norm",
    lambda self, x: self.first(x) + self.act(self.norm(self.conv2(x))),
    TwoGroups,
    {"norm2": None},
    fused={"conv": WHOLE, "conv2": ADDED_AFTER},
)
# One norm, behind a convolution and on the input.
add_net("shared_norm_once_alone", lambda self, x: self.first(x) + self.norm(x), fused=ADDED_AFTER)
# One activation module for all: it holds nothing, so sharing it hinders nothing.
add_net(
    "shared_activation",
    lambda self, x: self.act(self.second(self.first(x))),
    TwoGroups,
    fused={"conv": WHOLE, "conv2": WHOLE},
)


@case(fused=WHOLE)
def same_group_three_times(self: Any, x: Tensor) -> Tensor:
    """Recurrence: the same group each time, so all three places can be fused."""
    for _ in range(3):
        x = self.first(x)
    return x


class Branches(nn.Module):
    """The same block on several inputs, as detection heads do on pyramid levels."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Group()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.block(level) for level in (x, F.avg_pool2d(x, 2), x[:, :, 1:])]


add("same_block_on_several_levels", Branches, fused={"block.conv": WHOLE})


class SharedHead(nn.Module):
    """A head whose convolutions all levels share, each with norms of its own, as EfficientDet has it."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv()])
        self.norms = nn.ModuleList(
            [nn.ModuleList([nn.BatchNorm2d(4) for _ in self.convs]) for _ in range(levels)]
        )
        self.predict = conv(4, 2)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        results = []
        for x, norms in zip(features, self.norms, strict=True):
            for layer, norm in zip(self.convs, norms, strict=True):
                x = F.silu(norm(layer(x)))
            results.append(self.predict(x))
        return results


class Detector(nn.Module):
    """The head on three levels that the network makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SharedHead()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.head([x, F.avg_pool2d(x, 2), x[:, :, 1:]])


LEVELS = ("conv + norm + silu",) * 3
add("shared_head", Detector, fused={"head.convs.0": LEVELS, "head.convs.1": LEVELS})
add(
    "shared_head_on_a_list",
    SharedHead,
    fused={"convs.0": LEVELS, "convs.1": LEVELS},
    inputs=lambda draw: ([draw.image(salt=level) for level in range(3)],),
)


@case(fused={"embed.conv": (WHOLE, WHOLE), "embed.conv2": (NORMED, NORMED)}, inputs=two_images)
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = TwoGroups()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.one(x), self.one(y)
        return (first - second).square().mean((1, 2, 3))

    def one(self, x: Tensor) -> Tensor:
        return self.embed.norm2(self.embed.conv2(self.embed(x)))


class FrozenBatchNorm2d(nn.Module):
    """As DETR and its followers write it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        eps = 1e-5
        scale = w * (rv + eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


@case(fused={"conv": WHOLE, "conv2": ADDED})
class FrozenNorms(TwoGroups):
    """Norms that are arithmetic, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = FrozenBatchNorm2d(4), FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(super().forward(x)) + x)


# One of them behind two calls of a convolution.
add_net(
    "frozen_norm_shared",
    lambda self, x: self.act(self.norm(self.conv(self.norm(self.conv(x))))),
    FrozenNorms,
    fused=("conv + norm", "conv + norm + relu"),
)
# The same convolution and norm in two places, but not the same group.
add_net(
    "same_conv_and_norm_other_activation",
    lambda self, x: F.silu(self.norm(self.conv(self.first(x)))),
    fused=(WHOLE, "conv + norm + silu"),
)
# The same modules, only once with a residual.
add_net(
    "same_group_once_with_residual",
    lambda self, x: self.act(self.norm(self.conv(self.first(x))) + x),
    fused=(WHOLE, ADDED),
)


@case(fused=(WHOLE, "conv"))
def same_group_once_tapped(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same modules twice, but the second time the convolution's output is returned as well."""
    y = self.first(x)
    tapped = self.conv(y)
    return self.act(self.norm(tapped)), tapped


# The norm's output is used before and after the activation.
add_net(
    "norm_output_twice", lambda self, x: self.act(z := self.norm(self.conv(x))) * 0.5 + z.sin(), fused=NORMED
)
# The convolution's output is needed without the norm as well.
add_net("conv_output_twice", lambda self, x: self.act(self.norm(y := self.conv(x))) * y.cos(), unfused=SHARED)
# A feature tap: the convolution's output is an output of the network.
add_net(
    "conv_output_returned",
    lambda self, x: (self.act(self.norm(y := self.conv(x))), y),
    unfused=SHARED + "|return|output",
)


@case(unfused=SHARED + "|return|output")
def conv_output_in_a_dictionary(self: Any, x: Tensor) -> dict[str, Any]:
    features = {"raw": [self.conv(x)]}
    return {"y": self.act(self.norm(features["raw"][0])), "features": features}


# The value before the activation is an output too.
add_net("norm_output_returned", lambda self, x: (self.act(z := self.norm(self.conv(x))), z), fused=NORMED)


@case(Group, {"last": lambda: None}, attributes=("last",))
def conv_output_kept(self: Any, x: Tensor) -> Tensor:
    """A feature tap by assignment: no data flow shows it."""
    self.last = self.conv(x)
    return self.act(self.norm(self.last))


@case(Group, {"history": list}, attributes=("history",))
def conv_output_appended(self: Any, x: Tensor) -> Tensor:
    """A feature tap into a list that the network keeps."""
    y = self.conv(x)
    self.history.append(y.detach().mean())
    return self.act(self.norm(y))


@case()
def conv_output_for_its_shape(self: Any, x: Tensor) -> Tensor:
    """The convolution's output is asked for its size later on."""
    y = self.conv(x)
    z = self.act(self.norm(y))
    return z.reshape(y.shape[0], y.size(1), -1).mean(-1) * y.shape[2]


add_net(
    "shared_weight",
    lambda self, x: self.act(self.second(self.first(x))),
    TwoGroups,
    fused={"conv": WHOLE, "conv2": WHOLE},
    prepare=lambda network: setattr(network.conv2, "weight", network.conv.weight),
)


# A convolution whose weight a functional call uses as well.
add_net(
    "shared_weight_with_a_function",
    lambda self, x: self.first(x) + F.conv2d(x, self.conv.weight.flip(2, 3), None, 1, 1),
)


def tie_norms(network: Any) -> None:
    network.norm2.weight, network.norm2.bias = network.norm.weight, network.norm.bias


add_net(
    "shared_norm_parameters",
    lambda self, x: self.act(self.second(self.first(x))),
    TwoGroups,
    prepare=tie_norms,
)


# Registered under two names, called in one place; checkpoints hold both names.
add("two_names_one_place", Group, prepare=lambda network: setattr(network, "alias", network.conv))


# A head that is only used in training: its parameters have to stay.
add("never_called", net(None, TwoGroups), fused=WHOLE)


@case(TwoGroups, fused={"conv2": WHOLE}, prepare=lambda network: network.norm.train())
def result_not_used(self: Any, x: Tensor) -> Tensor:
    """A call for its side effect alone: the norm is in training mode, and its statistics have to move."""
    self.norm(self.conv(x))
    return self.act(self.second(x))


@case(unfused=SHARED)
def conv_output_in_parts(self: Any, x: Tensor) -> Tensor:
    """Half of the convolution's output goes another way."""
    y = self.conv(x)
    left, _ = y.chunk(2, 1)
    return self.act(self.norm(y)) + torch.cat([left, left], 1)


# What the convolutions read is shared by all, which is no hindrance.
add_net(
    "shared_input",
    lambda self, x: self.act(self.norm(self.conv(x)) + x) * self.act(self.second(x)),
    TwoGroups,
    fused={"conv": ADDED, "conv2": WHOLE},
)


@case(TwoGroups, {"conv2": lambda: conv(8)}, fused={"conv": WHOLE, "conv2": WHOLE})
def dense(self: Any, x: Tensor) -> Tensor:
    """Concatenations, each of everything before it."""
    features = [x]
    features.append(F.relu(self.norm(self.conv(torch.cat(features, 1)))))
    features.append(F.relu(self.second(torch.cat(features, 1))))
    return torch.cat(features, 1)
