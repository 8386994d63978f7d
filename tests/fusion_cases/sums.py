"""Sums whose operands a fuser has to tell apart, and residual blocks as libraries write them."""

from __future__ import annotations

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
    case,
    conv,
    two_images,
)


@case()
class NormOutputPlusItself(Group):
    """z + z."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z + z)


@case()
class ActivatedPlusItself(Group):
    """act(z) + act(z)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y + y


@case(fused={"conv": NORMED})
class ResidualFromTheNormOutput(Group):
    """The residual waits for the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z + torch.sigmoid(z))


@case()
class ResidualFromTheConvOutput(Group):
    """The residual waits for the convolution's output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y) + y.tanh())


@case(fused={"conv": WHOLE, "conv2": ADDED})
class ResidualThroughAnotherGroup(TwoGroups):
    """a + second(a): the second can take the sum, the first cannot, since the second waits for it."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm(self.conv(x)))
        return self.act(a + self.norm2(self.conv2(a)))


@case()
class BothAreConvolutions(TwoGroups):
    """Only one of the two can take the addition; the other is its residual."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.norm2(self.conv2(x)))


@case()
class BothAreActivated(TwoGroups):
    """relu(a) + relu(b): neither activation may be lost or done twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.act(self.norm2(self.conv2(x)))


@case()
class OneIsActivated(TwoGroups):
    """relu(relu(a) + b)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.act(self.norm(self.conv(x))) + self.norm2(self.conv2(x)))


@case()
class BothAreTheSameGroup(Group):
    """The same modules on both sides of the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3))))


@case(fused={"conv": "conv + norm + add"})
class SumUsedTwice(Group):
    """The sum is needed before and after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        return self.act(y) * y.cos()


@case()
class SumReturned(Group):
    """The sum is an output as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)) + x
        return self.act(y), y


@case(inputs=two_images)
class ThreeOperands(Group):
    """z + x + y."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x + y)


@case(inputs=two_images)
class PythonSum(Group):
    """`sum` starts with 0 + z."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(sum([self.norm(self.conv(x)), x, y]))


@case()
class AddThenActThenActAgain(Group):
    """silu(relu(z) + x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.act(self.norm(self.conv(x))) + x)


@case()
class AddThenNorm(Group):
    """The norm stands behind the addition, so it is not the convolution's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x) + x))


@case(fused={"conv": "conv + add + relu"})
class AddWithoutNorm(Group):
    """A residual block without a norm."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


@case()
class ExpandedResidual(Group):
    """The residual has the shape of the sum, but one row in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x[:, :, :1].expand_as(x))


@case(fused={"conv": NORMED})
class ScaledBranch(Group):
    """A layer scale between the norm and the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 0.9, 4).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.gamma * self.norm(self.conv(x)))


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


add("drop_path_in_eval_mode", DroppedBranch, fused={"conv": ADDED})
add(
    "drop_path_in_training_mode",
    DroppedBranch,
    fused={"conv": NORMED},
    prepare=lambda network: network.drop_path.train(),
)


@case()
class ShortcutWithMoreChannels(nn.Module):
    """A shortcut padded in its channels, by a size that depends on the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(4, 6, stride=2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
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
