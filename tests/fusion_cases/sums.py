"""Sums whose operands a fuser has to tell apart, and residual blocks as libraries write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import (
    ADDED,
    NORMED,
    WHOLE,
    Group,
    TwoGroups,
    add,
    add_net,
    case,
    conv,
    two_images,
)

add_net("norm_output_plus_itself", lambda self, x: self.act((z := self.norm(self.conv(x))) + z))
add_net("activated_plus_itself", lambda self, x: (y := self.first(x)) + y)
# The residual waits for the norm's output.
add_net(
    "residual_from_the_norm_output",
    lambda self, x: self.act((z := self.norm(self.conv(x))) + torch.sigmoid(z)),
    fused=NORMED,
)
# The residual waits for the convolution's output.
add_net("residual_from_the_conv_output", lambda self, x: self.act(self.norm(y := self.conv(x)) + y.tanh()))


@case(TwoGroups, fused={"conv": WHOLE, "conv2": ADDED})
def residual_through_another_group(self: Any, x: Tensor) -> Tensor:
    """a + second(a): the second can take the sum, the first cannot, since the second waits for it."""
    a = self.first(x)
    return self.act(a + self.second(a))


# Only one of the two can take the addition; the other is its residual.
add_net(
    "both_are_convolutions", lambda self, x: self.act(self.norm(self.conv(x)) + self.second(x)), TwoGroups
)
# relu(a) + relu(b): neither activation may be lost or done twice.
add_net("both_are_activated", lambda self, x: self.first(x) + self.act(self.second(x)), TwoGroups)
add_net("one_is_activated", lambda self, x: F.silu(self.first(x) + self.second(x)), TwoGroups)
# The same modules on both sides of the addition.
add_net(
    "both_are_the_same_group",
    lambda self, x: self.act(self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3)))),
)
# The sum is needed before and after the activation.
add_net(
    "sum_used_twice",
    lambda self, x: self.act(y := self.norm(self.conv(x)) + x) * y.cos(),
    fused="conv + norm + add",
)
add_net("sum_returned", lambda self, x: (self.act(y := self.norm(self.conv(x)) + x), y))
add_net("three_operands", lambda self, x, y: self.act(self.norm(self.conv(x)) + x + y), inputs=two_images)
add_net("python_sum", lambda self, x, y: self.act(sum([self.norm(self.conv(x)), x, y])), inputs=two_images)
add_net("add_then_act_then_act_again", lambda self, x: F.silu(self.first(x) + x))
# The norm stands behind the addition, so it is not the convolution's.
add_net("add_then_norm", lambda self, x: self.act(self.norm(self.conv(x) + x)))
add_net(
    "add_without_norm",
    lambda self, x: self.act(self.conv(x) + x),
    Group,
    {"norm": None},
    fused="conv + add + relu",
)
# The residual has the shape of the sum, but one row in memory.
add_net("expanded_residual", lambda self, x: self.act(self.norm(self.conv(x)) + x[:, :, :1].expand_as(x)))
# A layer scale between the norm and the addition.
add_net(
    "scaled_branch",
    lambda self, x: self.act(x + self.gamma * self.norm(self.conv(x))),
    Group,
    {"gamma": lambda: nn.Parameter(torch.linspace(0.1, 0.9, 4).reshape(4, 1, 1))},
    fused=NORMED,
)


class DropPath(nn.Module):
    """Drops the whole branch of some images, in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand_like(x[:, :1, :1, :1]) > 0.5)


class DroppedBranch(Group):
    """A stochastic branch before the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop_path(self.norm(self.conv(x))) + x)


add("drop_path_in_eval_mode", DroppedBranch, fused=ADDED)
add(
    "drop_path_in_training_mode",
    DroppedBranch,
    fused=NORMED,
    prepare=lambda network: network.drop_path.train(),
)


@case(nn.Module, {"conv": lambda: conv(4, 6, stride=2), "norm": lambda: nn.BatchNorm2d(6)})
def shortcut_with_more_channels(self: Any, x: Tensor) -> Tensor:
    """A shortcut padded in its channels, by a size that depends on the layers."""
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    return F.relu(self.norm(self.conv(x)) + shortcut)


class Bottleneck(nn.Module):
    """torchvision's block: one ReLU module for all, `out += identity`, an optional shortcut convolution."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, 3, stride=stride, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, k, 1, bias=False), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if c != k or stride != 1:
            self.downsample = nn.Sequential(conv(c, k, 1, stride=stride), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


add(
    "bottlenecks",
    lambda: nn.Sequential(Bottleneck(4, 6, 2), Bottleneck(6, 6, 1)),
    fused={
        "0.conv1": WHOLE,
        "0.conv2": WHOLE,
        "0.conv3": NORMED,
        "0.downsample.0": ADDED,
        "1.conv1": WHOLE,
        "1.conv2": WHOLE,
        "1.conv3": ADDED,
    },
)
