"""Tensors overwritten in place while somebody else still reads them, and where nobody does."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Group, TwoGroups, case


@case(TwoGroups, fused=WHOLE)
def add_in_place_read_later(self: Any, x: Tensor) -> Tensor:
    """`b` is the same tensor as `a`, so it sees the sum."""
    a = self.first(x)
    b = a
    a += self.second(a)
    return self.act(a) * b.cos()


@case(TwoGroups, fused=WHOLE)
def add_in_place_discarded(self: Any, x: Tensor) -> Tensor:
    """The sum is read under the old name only; the call's result is dropped."""
    a = self.first(x)
    a.add_(self.second(a))
    return self.act(a)


@case(TwoGroups, fused=WHOLE)
def add_in_place_by_function(self: Any, x: Tensor) -> Tensor:
    """`operator.iadd`, its result dropped as well as used."""
    a = self.first(x)
    b = operator.iadd(a, self.second(a))
    return self.act(b) * a.cos()


@case(TwoGroups, fused=WHOLE)
def add_in_place_read_through_a_view(self: Any, x: Tensor) -> Tensor:
    """A slice taken before the addition sees it."""
    a = self.first(x)
    view = a[:, :2]
    a += self.second(a)
    return torch.cat([self.act(a), view], 1)


@case(TwoGroups, fused={"conv": WHOLE, "conv2": ADDED})
def add_in_place_read_by_nobody(self: Any, x: Tensor) -> Tensor:
    """The overwritten tensor is never read again: this is how many networks write a residual."""
    a = self.first(x)
    a += self.second(a)
    return self.act(a)


@case(fused=ADDED)
def add_in_place_on_the_norm(self: Any, x: Tensor) -> Tensor:
    """torchvision's `out += identity`: the norm's output is the one overwritten."""
    z = self.norm(self.conv(x))
    z += x
    return self.act(z)


@case()
def add_in_place_method_on_the_norm(self: Any, x: Tensor) -> Tensor:
    """The same as a method, its result dropped."""
    z = self.norm(self.conv(x))
    z.add_(x)
    return F.relu(z, inplace=True)


@case(TwoGroups, fused=WHOLE)
def add_out(self: Any, x: Tensor) -> Tensor:
    """The sum written into a tensor that is read later under its own name."""
    a = self.first(x)
    z = self.second(a)
    torch.add(z, a, out=a)
    return self.act(a)


@case()
def add_in_place_on_the_input(self: Any, x: Tensor) -> Tensor:
    """The caller's own tensor is overwritten, and the caller sees it."""
    x += self.norm(self.conv(x))
    return self.act(x)


@case()
def add_in_place_on_a_view_of_the_input(self: Any, x: Tensor) -> Tensor:
    y = x.view(x.shape)
    y += self.norm(self.conv(x))
    return self.act(y)


@case(Group, {"identity": nn.Identity, "dropout": nn.Dropout})
def add_in_place_on_the_input_by_another_name(self: Any, x: Tensor) -> Tensor:
    """`contiguous`, `to` and an identity return the caller's tensor itself."""
    y = self.dropout(self.identity(x.contiguous().to(x.dtype)))
    y += self.norm(self.conv(x))
    return self.act(y)


@case(TwoGroups, {"identity": lambda: nn.Sequential(nn.Identity(), nn.Dropout())})
def own_tensor_by_another_name(self: Any, x: Tensor) -> Tensor:
    """A shortcut through an identity is no copy: it sees the sum."""
    a = self.first(x)
    shortcut = self.identity(a)
    a += self.second(x)
    return self.act(a) * shortcut.cos()


@case()
def norm_output_by_another_name(self: Any, x: Tensor) -> Tensor:
    """The value before the activation, taken through a method that returns the tensor itself."""
    z = self.norm(self.conv(x))
    before = z.contiguous()
    return F.relu_(z) + before


@case()
def activation_discarded(self: Any, x: Tensor) -> Tensor:
    """`F.relu_(z)` as a statement: nothing uses its result, and yet it counts."""
    z = self.norm(self.conv(x))
    F.relu_(z)
    return z


@case(prepare=lambda network: setattr(network.act, "inplace", True))
def activation_module_discarded(self: Any, x: Tensor) -> Tensor:
    """The same by a module with `inplace=True`."""
    z = self.norm(self.conv(x))
    self.act(z)
    return z * 2


@case(prepare=lambda network: setattr(network.act, "inplace", True))
def activation_module_in_place_read_later(self: Any, x: Tensor) -> Tensor:
    """The shortcut was taken before the activation, but the activation overwrote it."""
    shortcut = self.norm(self.conv(x))
    return self.act(shortcut) + shortcut


@case()
def activation_in_place_and_copy(self: Any, x: Tensor) -> Tensor:
    """The shortcut is a copy made before: it keeps the value."""
    z = self.norm(self.conv(x))
    shortcut = z.clone()
    return F.relu_(z) + shortcut


@case()
def activation_in_place_on_the_conv(self: Any, x: Tensor) -> Tensor:
    """The convolution's output is overwritten before the norm reads it."""
    y = self.conv(x)
    F.relu_(y)
    return self.act(self.norm(y))


@case()
def activation_in_place_on_the_input(self: Any, x: Tensor) -> Tensor:
    """The caller's tensor is rectified, before the convolution and so before the residual."""
    F.relu(x, inplace=True)
    return self.act(self.norm(self.conv(x)) + x)


@case(TwoGroups)
def pre_activation_in_place(self: Any, x: Tensor) -> Tensor:
    """The shortcut of a pre-activation block sees the in-place activation behind the norm's identity."""
    a = self.conv(x)
    b = F.relu_(a)
    return self.second(b) + a
