"""Tensors changed in place between the operations that a fuser would bring together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion_cases.case import NORMED, WHOLE, TwoGroups, add_net, case, two_images


@case()
def input_changed_after_the_conv(self: Any, x: Tensor) -> Tensor:
    """The convolution has to read its input before it is changed, the addition after."""
    y = self.conv(x)
    x.mul_(2)
    return self.act(self.norm(y) + x)


@case()
def input_changed_before_the_norm(self: Any, x: Tensor) -> Tensor:
    """The same without a residual: fused where the activation stands, the convolution would read zeros."""
    y = self.conv(x)
    x.zero_()
    z = self.norm(y)
    x.sub_(1)
    return self.act(z)


@case(TwoGroups)
def own_input_changed_after_the_conv(self: Any, x: Tensor) -> Tensor:
    """The same with a tensor of the network's own."""
    a = self.first(x)
    y = self.conv2(a)
    F.silu(a, inplace=True)
    return self.act(self.norm2(y)) + a


@case()
def input_changed_through_a_view(self: Any, x: Tensor) -> Tensor:
    """A slice of the input is zeroed between the convolution and its norm."""
    y = self.conv(x)
    x[:, :2].zero_()
    return self.act(self.norm(y) + x)


@case()
def input_changed_through_an_old_view(self: Any, x: Tensor) -> Tensor:
    """The view is older than the convolution."""
    half = x.chunk(2, 1)[0]
    y = self.conv(x)
    half.neg_()
    return self.act(self.norm(y) + x)


@case()
def input_changed_by_assignment(self: Any, x: Tensor) -> Tensor:
    """`x[...] = ` between the convolution and its norm."""
    y = self.conv(x)
    x[:, 1] = 3.0
    return self.act(self.norm(y))


@case(TwoGroups)
def residual_changed_before_the_add(self: Any, x: Tensor) -> Tensor:
    """The addition sees the changed residual."""
    residual = self.first(x)
    z = self.second(x)
    residual.mul_(3)
    return self.act(z + residual)


@case(TwoGroups)
def residual_changed_after_the_add(self: Any, x: Tensor) -> Tensor:
    """The addition has read the residual before it is changed."""
    residual = self.first(x)
    y = self.second(x) + residual
    residual.mul_(3)
    return self.act(y) + residual


@case()
def residual_of_the_caller_changed_after_the_add(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x)) + x
    x.fill_(2)
    return self.act(y)


@case()
def norm_output_changed(self: Any, x: Tensor) -> Tensor:
    """Between the norm and the addition another operation in place."""
    z = self.norm(self.conv(x))
    z.mul_(2)
    return self.act(z + x)


@case()
def norm_output_changed_through_a_view(self: Any, x: Tensor) -> Tensor:
    """Half of the channels are cleared before the activation."""
    z = self.norm(self.conv(x))
    z[:, :2].fill_(0.5)
    return self.act(z)


@case()
def norm_output_changed_in_parts(self: Any, x: Tensor) -> Tensor:
    """The parts of a split are views: what happens to them happens to the whole."""
    z = self.norm(self.conv(x))
    first, second = torch.split(z, 2, dim=1)
    first.neg_()
    second.add_(1)
    return self.act(z)


@case()
def conv_output_changed(self: Any, x: Tensor) -> Tensor:
    """Between the convolution and its norm."""
    y = self.conv(x)
    y[:, :, ::2] *= 0.5
    return self.act(self.norm(y))


@case()
def conv_output_replaced(self: Any, x: Tensor) -> Tensor:
    """`copy_` leaves nothing of the convolution's output but its memory."""
    y = self.conv(x)
    y.copy_(x.sin())
    return self.act(self.norm(y))


@case()
def sum_changed(self: Any, x: Tensor) -> Tensor:
    """Between the addition and the activation, and read afterwards too."""
    y = self.norm(self.conv(x)) + x
    y.clamp_(max=0.7)
    return self.act(y) - y


@case()
def sum_overwritten_by_the_activation(self: Any, x: Tensor) -> Tensor:
    """The activation overwrites the sum, which is returned by its own name."""
    y = self.norm(self.conv(x)) + x
    torch.relu_(y)
    return y


# Both operands are the same tensor after the activation has overwritten it.
add_net("norm_output_added_to_itself_activated", lambda self, x: (z := self.norm(self.conv(x))) + F.relu_(z))


@case(fused=WHOLE)
def input_scaled_in_place(self: Any, x: Tensor) -> Tensor:
    """A network that normalises its own input in place, which the caller sees."""
    x.mul_(0.5).sub_(0.1)
    return self.first(x)


# The caller gets its own tensor back.
add_net("input_returned", lambda self, x: (self.first(x), x))


@case(inputs=two_images)
def other_input_overwritten(self: Any, x: Tensor, into: Tensor) -> Tensor:
    """The result is written into a second input."""
    into.copy_(self.first(x))
    return into


@case(TwoGroups)
def written_into_slices(self: Any, x: Tensor) -> Tensor:
    """Results are gathered in a buffer made in forward."""
    gathered = x.new_zeros(x.shape[0], 8, x.shape[2], x.shape[3])
    gathered[:, :4] = self.first(x)
    gathered[:, 4:] += self.act(self.second(x))
    return gathered


@case()
def statistics_changed_before_the_activation(self: Any, x: Tensor) -> Tensor:
    """Forward moves the running mean after the norm has used it."""
    z = self.norm(self.conv(x))
    self.norm.running_mean.add_(0.25)
    return self.act(z)


@case()
def statistics_changed_before_the_norm(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    self.norm.running_mean.mul_(0.5)
    return self.act(self.norm(y))


# A shortcut beside an activation that overwrites nothing.
add_net(
    "read_after_an_activation_out_of_place",
    lambda self, x: F.relu((z := self.norm(self.conv(x))), inplace=False) * z.sin(),
    fused=NORMED,
)
