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

from tests.fusion_cases.case import WHOLE, Draw, Group, TwoGroups, add_net, case, conv

# Whether gradients are recorded is no property of the network.
add_net("branch_on_grad_mode", lambda self, x: self.first(x) * (1 if torch.is_grad_enabled() else 2))


@case(TwoGroups)
def without_gradients(self: Any, x: Tensor) -> Tensor:
    """The stem is kept from gradients by a context, which is no operation."""
    with torch.no_grad():
        x = self.first(x)
    return self.act(self.second(x))


@case()
class DecoratedForward(Group):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


@case()
def context_around_the_conv(self: Any, x: Tensor) -> Tensor:
    """The norm's parameters have gradients, the convolution's have none."""
    with torch.no_grad():
        y = self.conv(x)
    return self.act(self.norm(y))


@case(TwoGroups, dtype=torch.float32, tolerance=1e-5)
def autocast_inside(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.first(x)
    return self.act(self.second(y.float()))


add_net("random", lambda self, x: self.act(self.norm(self.conv(x)) + torch.rand(4, 1, 1, dtype=x.dtype)))
add_net("random_like_the_input", lambda self, x: self.act(self.norm(self.conv(x)) + torch.randn_like(x)))


@case()
class RandomInPython(TwoGroups):
    """Which group runs is drawn by Python."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if random.random() < x.shape[0] / 4:
            return y
        return self.act(self.second(x))

    def __init__(self) -> None:
        super().__init__()
        self.norm2.eps = 0.1


@case(TwoGroups)
def random_depth(self: Any, x: Tensor) -> Tensor:
    """Stochastic depth by Python's generator alone: no tensor takes part in the choice."""
    y = self.first(x)
    for _ in range(random.randint(1, 4)):
        y = self.act(self.second(y))
    return y


@case()
def constants(self: Any, x: Tensor) -> Tensor:
    """Tensors made in forward, of fixed size and of the image's."""
    rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).reshape(1, 1, -1, 1)
    z = self.act(self.norm(self.conv(x + rows * 0.1)) + torch.ones_like(x))
    return z * torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(4, 1, 1) + torch.tensor(0.5)


@case()
class Counting(Group):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) * self.calls


@case(Counting)
def counting_in_place(self: Any, x: Tensor) -> Tensor:
    """The same by a method, whose result nothing uses."""
    self.calls.add_(1)
    return self.first(x)


@case(Group, {"mean": lambda: torch.zeros(1, 4, 1, 1)})
def buffer_replaced(self: Any, x: Tensor) -> Tensor:
    """A buffer that holds the last mean, a new tensor each time."""
    y = self.act(self.norm(self.conv(x)) - self.mean)
    self.mean = x.detach().mean((0, 2, 3), keepdim=True)
    return y


@case(Group, {"calls": lambda: 0}, attributes=("calls",))
def counting_in_python(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.first(x) * self.calls


@case(Group, {"previous": lambda: None}, attributes=("previous",))
def recurrent(self: Any, x: Tensor) -> Tensor:
    """The result depends on the last call's."""
    y = self.first(x)
    if self.previous is not None:
        y = y + self.previous
    self.previous = y.detach().mean()
    return y


@case()
def warns(self: Any, x: Tensor) -> Tensor:
    """Python that has no part in the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("a remark", stacklevel=1)
    return self.first(x)


# `view` takes the layout that a contiguous image has, which channels_last has not.
add_net("flattened_by_view", lambda self, x: (y := self.first(x)).view(y.shape[0], -1))
add_net(
    "reads_strides",
    lambda self, x: torch.as_strided(
        (y := self.first(x)), (y.shape[0], 12), (y.shape[1] * y.shape[2] * y.shape[3], 1)
    ),
)
add_net("branch_on_layout", lambda self, x: (y := self.first(x)) * (2 if y.is_contiguous() else 3))


@case(fused=WHOLE)
def branch_on_the_network(self: Any, x: Tensor) -> Tensor:
    """Branches on what the network is are fixed, and can be traced."""
    y = self.conv(x)
    if hasattr(self, "norm") and isinstance(self.norm, nn.BatchNorm2d) and not self.training:
        y = self.norm(y)
    return self.act(y)


# A list of features is concatenated first, as DenseNet does.
add_net("type_of_the_input", lambda self, x: self.first(torch.cat(([x] if isinstance(x, Tensor) else x), 1)))
# A block under activation checkpointing.
add_net(
    "checkpointed",
    lambda self, x: torch.utils.checkpoint.checkpoint(self.group, x, use_reentrant=False),
    nn.Module,
    {"group": Group},
)


@case(draws=(Draw(1, 2, 8, 9), Draw(2, 2, 8, 9), Draw(4, 2, 8, 9)))
def numbers_out(self: Any, x: Tensor) -> dict[str, Any]:
    y = self.first(x)
    return {"mean": y.mean().item(), "size": tuple(y.shape), "name": "y", "y": y}


@case(nn.Module, {"conv": lambda: conv(stride=2), "norm": lambda: nn.BatchNorm2d(4)})
def upsampled(self: Any, x: Tensor) -> Tensor:
    """A size computed from another tensor's, as segmenters do."""
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
def sets_data(self: Any, x: Tensor) -> Tensor:
    y = Group.forward(self, x)
    y.data = y.data * 2
    return y


# The usual way to ask for a dtype, and how many there are.
add_net(
    "asks_for_parameters",
    lambda self, x: Group.forward(self, x.to(next(self.parameters()).dtype)) * len(self.state_dict()),
)
