"""Tensors overwritten in place while somebody else still reads them, and where nobody does."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, NORMED, WHOLE, Group, TwoGroups, case, two_images


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


@case(fused={"conv": ADDED})
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


@case()
class InputChangedAfterTheConv(Group):
    """The convolution has to read its input before it is changed, the addition after."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.mul_(2)
        return self.act(self.norm(y) + x)


@case()
class InputChangedBeforeTheNorm(Group):
    """The same without a residual: fused where the activation stands, the convolution would read zeros."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.zero_()
        z = self.norm(y)
        x.sub_(1)
        return self.act(z)


@case()
class OwnInputChangedAfterTheConv(Stages):
    """The same with a tensor of the network's own."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        y = self.conv2(a)
        F.silu(a, inplace=True)
        return self.act(self.norm2(y)) + a


@case()
class InputChangedThroughAView(Group):
    """A slice of the input is zeroed between the convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x[:, :2].zero_()
        return self.act(self.norm(y) + x)


@case()
class InputChangedThroughAnOldView(Group):
    """The view is older than the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.chunk(2, 1)[0]
        y = self.conv(x)
        half.neg_()
        return self.act(self.norm(y) + x)


@case()
class InputChangedByAssignment(Group):
    """`x[...] = ` between the convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x[:, 1] = 3.0
        return self.act(self.norm(y))


@case()
class ResidualChangedBeforeTheAdd(Stages):
    """The addition sees the changed residual."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.first(x)
        z = self.second(x)
        residual.mul_(3)
        return self.act(z + residual)


@case()
class ResidualChangedAfterTheAdd(Stages):
    """The addition has read the residual before it is changed."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.first(x)
        y = self.second(x) + residual
        residual.mul_(3)
        return self.act(y) + residual


@case()
class ResidualOfTheCallerChangedAfterTheAdd(Group):
    """The same with the network's input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        x.fill_(2)
        return self.act(y)


@case()
class NormOutputChanged(Group):
    """Between the norm and the addition another operation in place."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        z.mul_(2)
        return self.act(z + x)


@case()
class NormOutputChangedThroughAView(Group):
    """Half of the channels are cleared before the activation."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        z[:, :2].fill_(0.5)
        return self.act(z)


@case()
class NormOutputChangedInParts(Group):
    """The parts of a split are views: what happens to them happens to the whole."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        first, second = torch.split(z, 2, dim=1)
        first.neg_()
        second.add_(1)
        return self.act(z)


@case()
class ConvOutputChanged(Group):
    """Between the convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :, ::2] *= 0.5
        return self.act(self.norm(y))


@case()
class ConvOutputReplaced(Group):
    """`copy_` leaves nothing of the convolution's output but its memory."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.copy_(x.sin())
        return self.act(self.norm(y))


@case()
class SumChanged(Group):
    """Between the addition and the activation, and read afterwards too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        y.clamp_(max=0.7)
        return self.act(y) - y


@case()
class SumOverwrittenByTheActivation(Group):
    """The activation overwrites the sum, which is returned by its own name."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        torch.relu_(y)
        return y


@case()
class NormOutputAddedToItselfActivated(Group):
    """Both operands are the same tensor after the activation has overwritten it."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return z + F.relu_(z)


@case(fused={"conv": WHOLE})
class InputScaledInPlace(Group):
    """A network that normalises its own input in place, which the caller sees."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5).sub_(0.1)
        return self.act(self.norm(self.conv(x)))


@case()
class InputReturned(Group):
    """The caller gets its own tensor back."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.norm(self.conv(x))), x


@case(inputs=two_images)
class OtherInputOverwritten(Group):
    """The result is written into a second input."""

    def forward(self, x: Tensor, into: Tensor) -> Tensor:
        into.copy_(self.act(self.norm(self.conv(x))))
        return into


@case()
class WrittenIntoSlices(TwoGroups):
    """Results are gathered in a buffer made in forward."""

    def forward(self, x: Tensor) -> Tensor:
        gathered = x.new_zeros(x.shape[0], 8, x.shape[2], x.shape[3])
        gathered[:, :4] = self.act(self.norm(self.conv(x)))
        gathered[:, 4:] += self.act(self.norm2(self.conv2(x)))
        return gathered


@case()
class StatisticsChangedBeforeTheActivation(Group):
    """Forward moves the running mean after the norm has used it."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        self.norm.running_mean.add_(0.25)
        return self.act(z)


@case()
class StatisticsChangedBeforeTheNorm(Group):
    """And before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.norm.running_mean.mul_(0.5)
        return self.act(self.norm(y))


@case(fused={"conv": NORMED})
class ReadAfterAnActivationOutOfPlace(Group):
    """A shortcut beside an activation that overwrites nothing."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return F.relu(z, inplace=False) * z.sin()
