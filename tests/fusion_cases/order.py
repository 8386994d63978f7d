"""Tensors changed in place between the operations that a fuser would bring together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion_cases.case import NORMED, WHOLE, Group, TwoGroups, case, two_images
from tests.fusion_cases.mutation import Stages


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
