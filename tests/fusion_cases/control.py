"""Python in forward that a trace cannot see or would freeze: branches, contexts, state, randomness."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, Group, TwoGroups, add_net, case


@case(TwoGroups)
def branch_on_values(self: Any, x: Tensor) -> Tensor:
    """Which group runs depends on what is in the image."""
    if x.mean() > 0:
        return self.first(x)
    return self.act(self.second(x))


@case()
def norm_skipped_on_values(self: Any, x: Tensor) -> Tensor:
    """One run shows a convolution and its norm; another image skips the norm."""
    y = self.conv(x)
    if x.mean() > 0:
        y = self.norm(y)
    return self.act(y)


@case()
def conv_output_kept_on_values(self: Any, x: Tensor) -> Tensor:
    """On another image the convolution's output goes elsewhere as well."""
    y = self.conv(x)
    z = self.act(self.norm(y))
    return z if x.mean() > 0 else z * y


@case()
def changed_between_on_values(self: Any, x: Tensor) -> Tensor:
    """Something is done between the convolution and its norm, for other images only."""
    y = self.conv(x)
    if x.mean() < 0:
        y.mul_(-2)
    return self.act(self.norm(y))


@case()
def repeated(self: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.abs().sum()) % 3 + 1):
        x = self.first(x)
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


@case(TwoGroups)
def branch_on_sizes(self: Any, x: Tensor) -> Tensor:
    """Which group runs depends on the image's size."""
    if x.shape[2] > 9:
        return self.first(x)
    return self.act(self.second(x))


# One image is treated otherwise than several.
add_net("branch_on_the_batch", lambda self, x: self.first(x).squeeze(0) if len(x) == 1 else self.first(x))


@case()
class LoopOverImages(Group):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(image[None])[0] for image in x])


@case()
def assertion(self: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 4, "four channels"
    torch._assert(x.dim() == 4, "a batch")
    return self.first(x)
