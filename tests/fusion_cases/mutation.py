"""Tensors overwritten in place while somebody else still reads them, and where nobody does."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Group, TwoGroups, case


class Stages(TwoGroups):
    """`first` makes a tensor of the network's own, which `second` is added to."""

    def first(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(x))


@case(fused={"conv": WHOLE})
class AddInPlaceReadLater(Stages):
    """`b` is the same tensor as `a`, so it sees the sum."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = a
        a += self.second(a)
        return self.act(a) * b.cos()


@case(fused={"conv": WHOLE})
class AddInPlaceDiscarded(Stages):
    """The sum is read under the old name only; the call's result is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        a.add_(self.second(a))
        return self.act(a)


@case(fused={"conv": WHOLE})
class AddInPlaceByFunction(Stages):
    """`operator.iadd`, its result dropped as well as used."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = operator.iadd(a, self.second(a))
        return self.act(b) * a.cos()


@case(fused={"conv": WHOLE})
class AddInPlaceReadThroughAView(Stages):
    """A slice taken before the addition sees it."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        view = a[:, :2]
        a += self.second(a)
        return torch.cat([self.act(a), view], 1)


@case(fused={"conv": WHOLE, "conv2": ADDED})
class AddInPlaceReadByNobody(Stages):
    """The overwritten tensor is never read again: this is how many networks write a residual."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        a += self.second(a)
        return self.act(a)


@case(fused={"conv": ADDED})
class AddInPlaceOnTheNorm(Group):
    """torchvision's `out += identity`: the norm's output is the one overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        z += x
        return self.act(z)


@case()
class AddInPlaceMethodOnTheNorm(Group):
    """The same as a method, its result dropped."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        z.add_(x)
        return F.relu(z, inplace=True)


@case(fused={"conv": WHOLE})
class AddOut(Stages):
    """The sum written into a tensor that is read later under its own name."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        z = self.second(a)
        torch.add(z, a, out=a)
        return self.act(a)


@case()
class AddInPlaceOnTheInput(Group):
    """The caller's own tensor is overwritten, and the caller sees it."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.norm(self.conv(x))
        return self.act(x)


@case()
class AddInPlaceOnAViewOfTheInput(Group):
    """The same through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape)
        y += self.norm(self.conv(x))
        return self.act(y)


@case()
class AddInPlaceOnTheInputByAnotherName(Group):
    """`contiguous`, `to` and an identity return the caller's tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        self.identity, self.dropout = nn.Identity(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.identity(x.contiguous().to(x.dtype)))
        y += self.norm(self.conv(x))
        return self.act(y)


@case()
class OwnTensorByAnotherName(Stages):
    """A shortcut through an identity is no copy: it sees the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Sequential(nn.Identity(), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        shortcut = self.identity(a)
        a += self.second(x)
        return self.act(a) * shortcut.cos()


@case()
class NormOutputByAnotherName(Group):
    """The value before the activation, taken through a method that returns the tensor itself."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        before = z.contiguous()
        return F.relu_(z) + before


@case()
class ActivationDiscarded(Group):
    """`F.relu_(z)` as a statement: nothing uses its result, and yet it counts."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        F.relu_(z)
        return z


@case(prepare=lambda network: setattr(network.act, "inplace", True))
class ActivationModuleDiscarded(Group):
    """The same by a module with `inplace=True`."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        self.act(z)
        return z * 2


@case(prepare=lambda network: setattr(network.act, "inplace", True))
class ActivationModuleInPlaceReadLater(Group):
    """The shortcut was taken before the activation, but the activation overwrote it."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.norm(self.conv(x))
        return self.act(shortcut) + shortcut


@case()
class ActivationInPlaceAndCopy(Group):
    """The shortcut is a copy made before: it keeps the value."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        shortcut = z.clone()
        return F.relu_(z) + shortcut


@case()
class ActivationInPlaceOnTheConv(Group):
    """The convolution's output is overwritten before the norm reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        F.relu_(y)
        return self.act(self.norm(y))


@case()
class ActivationInPlaceOnTheInput(Group):
    """The caller's tensor is rectified, before the convolution and so before the residual."""

    def forward(self, x: Tensor) -> Tensor:
        F.relu(x, inplace=True)
        return self.act(self.norm(self.conv(x)) + x)


@case(unused_norms=("norm",))
class PreActivationInPlace(TwoGroups):
    """The shortcut of a pre-activation block sees the in-place activation behind the norm's identity."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        b = F.relu_(a)
        return self.norm2(self.conv2(b)) + a
