"""Contexts, randomness, state and layout: what a trace would lose or freeze."""

from __future__ import annotations

import random
import types
import warnings
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import WHOLE, Draw, Group, TwoGroups, case, conv


@case()
class BranchOnGradMode(Group):
    """Whether gradients are recorded is no property of the network."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y if torch.is_grad_enabled() else y * 2


@case()
class WithoutGradients(TwoGroups):
    """The stem is kept from gradients by a context, which is no operation."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.act(self.norm(self.conv(x)))
        return self.act(self.norm2(self.conv2(x)))


@case()
class DecoratedForward(Group):
    """The whole of it is."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@case()
class ContextAroundTheConv(Group):
    """The norm's parameters have gradients, the convolution's have none."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        return self.act(self.norm(y))


@case(dtype=torch.float32, tolerance=1e-5)
class AutocastInside(TwoGroups):
    """A part in bfloat16, by a context."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.act(self.norm(self.conv(x)))
        return self.act(self.norm2(self.conv2(y.float())))


@case()
class Random(Group):
    """Noise drawn in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + torch.rand(4, 1, 1, dtype=x.dtype))


@case()
class RandomLikeTheInput(Group):
    """The same with the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + torch.randn_like(x))


@case()
class RandomInPython(TwoGroups):
    """Which group runs is drawn by Python."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        if random.random() < x.shape[0] / 4:
            return y
        return self.act(self.norm2(self.conv2(x)))

    def __init__(self) -> None:
        super().__init__()
        self.norm2.eps = 0.1


@case()
class RandomDepth(TwoGroups):
    """Stochastic depth by Python's generator alone: no tensor takes part in the choice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        for _ in range(random.randint(1, 4)):
            y = self.act(self.norm2(self.conv2(y)))
        return y


@case()
class Constants(Group):
    """Tensors made in forward, of fixed size and of the image's."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).reshape(1, 1, -1, 1)
        z = self.act(self.norm(self.conv(x + rows * 0.1)) + torch.ones_like(x))
        return z * torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(4, 1, 1) + torch.tensor(0.5)


@case()
class Counting(Group):
    """A buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.norm(self.conv(x))) * self.calls


@case()
class CountingInPlace(Counting):
    """The same by a method, whose result nothing uses."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.act(self.norm(self.conv(x)))


@case()
class BufferReplaced(Group):
    """A buffer that holds the last mean, a new tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)) - self.mean)
        self.mean = x.detach().mean((0, 2, 3), keepdim=True)
        return y


@case(attributes=("calls",))
class CountingInPython(Group):
    """An attribute that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self.norm(self.conv(x))) * self.calls


@case(attributes=("previous",))
class Recurrent(Group):
    """The result depends on the last call's."""

    def __init__(self) -> None:
        super().__init__()
        self.previous: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        if self.previous is not None:
            y = y + self.previous
        self.previous = y.detach().mean()
        return y


@case()
class Warns(Group):
    """Python that has no part in the result."""

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.warn("a remark", stacklevel=1)
        return self.act(self.norm(self.conv(x)))


@case()
class FlattenedByView(Group):
    """`view` takes the layout that a contiguous image has, which channels_last has not."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y.view(y.shape[0], -1)


@case()
class ReadsStrides(Group):
    """The memory read as it lies."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return torch.as_strided(y, (y.shape[0], 12), (y.shape[1] * y.shape[2] * y.shape[3], 1))


@case()
class BranchOnLayout(Group):
    """Layout decides."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y * 2 if y.is_contiguous() else y * 3


@case(fused={"conv": WHOLE})
class BranchOnTheNetwork(Group):
    """Branches on what the network is are fixed, and can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if hasattr(self, "norm") and isinstance(self.norm, nn.BatchNorm2d) and not self.training:
            y = self.norm(y)
        return self.act(y)


@case()
class TypeOfTheInput(Group):
    """A list of features is concatenated first, as DenseNet does."""

    def forward(self, x: Any) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return self.act(self.norm(self.conv(torch.cat(features, 1))))


@case()
class Checkpointed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.group = Group()

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.group, x, use_reentrant=False)


@case(draws=(Draw(1, 2, 8, 9), Draw(2, 2, 8, 9), Draw(4, 2, 8, 9)))
class NumbersOut(Group):
    """Results that are no tensors."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.act(self.norm(self.conv(x)))
        return {"mean": y.mean().item(), "size": tuple(y.shape), "name": "y", "y": y}


@case()
class Upsampled(nn.Module):
    """A size computed from another tensor's, as segmenters do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(stride=2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


OUTSIDE: dict[int, list[Tensor]] = {}


@case(attributes=("last", "kept", "calls"))
class KeptOutside(Group):
    """In an object, in a global, in a deque: where no attribute of a module shows it."""

    last = property(lambda self: self.holder.last)
    kept = property(lambda self: OUTSIDE.get(id(self)))

    def __init__(self) -> None:
        super().__init__()
        self.holder, self.calls = types.SimpleNamespace(last=None), deque([0])

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.holder.last = y.detach()
        OUTSIDE[id(self)] = [y.detach() * 2]
        self.calls.append(self.calls[-1] + 1)
        return y


@case()
class SetsData(Group):
    """No operation does it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y.data = y.data * 2
        return y


@case()
class AsksForParameters(Group):
    """The usual way to ask for a dtype, and how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(self.parameters()).dtype)) * len(self.state_dict())
