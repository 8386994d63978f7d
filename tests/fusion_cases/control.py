"""Python in forward that a trace cannot see or would freeze: branches, contexts, state, randomness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, Group, TwoGroups, case


@case()
class BranchOnValues(TwoGroups):
    """Which group runs depends on what is in the image."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.act(self.norm(self.conv(x)))
        return self.act(self.norm2(self.conv2(x)))


@case()
class NormSkippedOnValues(Group):
    """One run shows a convolution and its norm; another image skips the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.mean() > 0:
            y = self.norm(y)
        return self.act(y)


@case()
class NormElsewhereOnValues(Group):
    """On another image the norm is called on something else."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.act(self.norm(self.conv(x)))
        return self.act(self.norm(x)) + self.act(self.norm(self.conv(x)))


@case()
class ActivationSkippedOnValues(Group):
    """On another image there is no activation."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z) if x.mean() > 0 else z


@case()
class ConvOutputKeptOnValues(Group):
    """On another image the convolution's output goes elsewhere as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.act(self.norm(y))
        return z if x.mean() > 0 else z * y


@case()
class NormsSwappedOnValues(TwoGroups):
    """Which norm follows depends on the image."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm if x.mean() > 0 else self.norm2
        return self.act(norm(self.conv(x)))


@case()
class ActivationOfAnotherLayerOnValues(Group):
    """The activation module is also called alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() < 0:
            x = self.act(x)
        return self.act(self.norm(self.conv(x)))


@case()
class ChangedBetweenOnValues(Group):
    """Something is done between the convolution and its norm, for other images only."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.mean() < 0:
            y.mul_(-2)
        return self.act(self.norm(y))


@case()
class Repeated(Group):
    """As often as the image says."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum()) % 3 + 1):
            x = self.act(self.norm(self.conv(x)))
        return x


class TraceablePart(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.group = Group()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.group.norm(self.group.conv(x)) + x)


@case(fused={"part.group.conv": ADDED})
class BranchAroundTraceableParts(nn.Module):
    """The root branches, but the blocks in it can be traced whole."""

    def __init__(self) -> None:
        super().__init__()
        self.part = TraceablePart()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.mean() > 0 else self.part(x * 2) - 1


@case()
class BranchOnSizes(TwoGroups):
    """Which group runs depends on the image's size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 9:
            return self.act(self.norm(self.conv(x)))
        return self.act(self.norm2(self.conv2(x)))


@case()
class BranchOnTheBatch(Group):
    """One image is treated otherwise than several."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y.squeeze(0) if len(x) == 1 else y


@case()
class LoopOverImages(Group):
    """One image at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.act(self.norm(self.conv(image[None])))[0] for image in x])


@case()
class Assertion(Group):
    """A check of the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4, "four channels"
        torch._assert(x.dim() == 4, "a batch")
        return self.act(self.norm(self.conv(x)))
