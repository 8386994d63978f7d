"""Additions: which of them are residuals, and which only look like one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, ADDED_AFTER, NORMED, Draw, Group, add, add_net


class Adds(Group):
    """act(sum of z and x), the sum as given."""

    def __init__(self, sum_of: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.sum_of = sum_of

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.sum_of(self.norm(self.conv(x)), x))


class AddsAfter(Adds):
    """The sum of act(z) and x."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sum_of(self.first(x), x)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "plus": lambda z, x: z + x,
    "plus_reversed": lambda z, x: x + z,
    "torch_add": lambda z, x: torch.add(z, x),
    "torch_add_reversed": lambda z, x: torch.add(x, z),
    "torch_add_keywords": lambda z, x: torch.add(input=z, other=x),
    "torch_add_alpha_one": lambda z, x: torch.add(z, x, alpha=1),
    "method": lambda z, x: z.add(x),
    "method_reversed": lambda z, x: x.add(z),
    "in_place": lambda z, x: z.add_(x),
    "iadd": lambda z, x: operator.iadd(z, x),
    "operator": lambda z, x: operator.add(x, z),
}
for _form, _sum_of in FORMS.items():
    add(f"add_{_form}", lambda sum_of=_sum_of: Adds(sum_of), fused=ADDED)
    add(f"add_after_{_form}", lambda sum_of=_sum_of: AddsAfter(sum_of), fused=ADDED_AFTER)

NO_RESIDUALS: dict[str, Callable[[Any, Any], Any]] = {
    "alpha": lambda z, x: torch.add(z, x, alpha=2),
    "alpha_on_z": lambda z, x: torch.add(x, z, alpha=0.5),
    "alpha_in_place": lambda z, x: z.add_(x, alpha=-1),
    "difference": lambda z, x: z - x,
    "difference_reversed": lambda z, x: x - z,
    "torch_sub": lambda z, x: torch.sub(z, x),
    "reversed_sub": lambda z, x: torch.rsub(z, x),
    "product": lambda z, x: z * x,
    "maximum": lambda z, x: torch.maximum(z, x),
    "number": lambda z, x: z + 0.75,
    "number_first": lambda z, x: 1 + z,
    "scalar_tensor": lambda z, x: z + x.mean(),
    "per_channel_and_image": lambda z, x: z + x.mean((2, 3), keepdim=True),
    "of_one_image": lambda z, x: z + x[:1] if x.shape[0] != 1 else z + x * 1,
    "of_one_channel": lambda z, x: x[:, :1] + z,
    "of_one_row": lambda z, x: z + x[:, :, :1],
    "without_batch": lambda z, x: x[0] + z,
    "with_one_dimension_more": lambda z, x: (z + x[None])[0],
    "in_place_broadcast": lambda z, x: z.add_(x.amax((2, 3), keepdim=True)),
}
# Which of these broadcast shows in the shapes alone, which a trace does not know.
BROADCASTS = {
    "scalar_tensor",
    "per_channel_and_image",
    "of_one_image",
    "of_one_channel",
    "of_one_row",
    "without_batch",
    "with_one_dimension_more",
    "in_place_broadcast",
}
for _form, _sum_of in NO_RESIDUALS.items():
    add(
        f"no_residual_{_form}",
        lambda sum_of=_sum_of: Adds(sum_of),
        fused={} if _form in BROADCASTS else {"conv": NORMED},
    )


# A learned offset of shape [1, K, 1, 1].
add_net(
    "parameter_per_channel",
    lambda self, x: self.act(self.norm(self.conv(x)) + self.offset),
    Group,
    {"offset": lambda: nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1))},
    fused=NORMED,
)
# A position embedding: as large as the sum for one image, broadcast for three.
add_net(
    "parameter_of_the_examples_shape",
    lambda self, x: self.act(self.norm(self.conv(x)) + self.position),
    Group,
    {"position": lambda: nn.Parameter(torch.linspace(-1, 1, 288).reshape(1, 4, 8, 9))},
    draws=(Draw(1, 1, 8, 9), Draw(2, 3, 8, 9), Draw(3, 1, 8, 9)),
)
# Pooled to one pixel: as large as the sum for an image of one pixel, broadcast for others.
add_net(
    "pooled_residual",
    lambda self, x: self.act(self.norm(self.conv(x)) + F.adaptive_avg_pool2d(x, 1)),
    draws=(Draw(1, 2, 1, 1), Draw(2, 3, 8, 9), Draw(3, 1, 1, 7)),
)
# A second input with a batch of one: the same size in the example only.
add_net(
    "input_of_one_image",
    lambda self, x, residual: self.act(self.norm(self.conv(x)) + residual),
    draws=(Draw(1, 1, 8, 9), Draw(2, 3, 11, 7)),
    inputs=lambda draw: (draw.image(), draw.tensor(1, 4, draw.h, draw.w)),
)
# The convolution makes one pixel, which the addition spreads over the residual.
add_net(
    "sum_broadcast_up",
    lambda self, x, y: F.relu(self.norm(self.conv(x)) + y),
    nn.Module,
    {"conv": lambda: nn.Conv2d(4, 4, 3), "norm": lambda: nn.BatchNorm2d(4)},
    inputs=lambda draw: (draw.tensor(draw.n, 4, 3, 3), draw.image(salt=1)),
)
add_net(
    "sum_of_more_dimensions",
    lambda self, x, y: F.relu(self.norm(self.conv(x)) + y),
    inputs=lambda draw: (draw.tensor(2, 4, 8, 9), draw.tensor(1, 2, 4, 8, 9, salt=1)),
)
# [C, H, W] in, [K, P, Q] out; nn.BatchNorm2d takes no such image.
add_net(
    "without_batch_dimension",
    lambda self, x: self.act(self.conv(x) + x),
    Group,
    {"norm": None},
    inputs=lambda draw: (draw.tensor(4, draw.h, draw.w),),
    fused="conv + add + relu",
)
add_net(
    "residual_with_a_batch_for_one_image",
    lambda self, x, y: self.act(self.conv(x) + y),
    Group,
    {"norm": None},
    inputs=lambda draw: (draw.tensor(4, draw.h, draw.w), draw.image(salt=1)),
)
add_net("residual_of_higher_precision", lambda self, x: self.act(self.norm(self.conv(x)) + x.double()))
# float64 plus float32 is float64: the residual is converted, not refused.
add_net("residual_of_lower_precision", lambda self, x: self.act(self.norm(self.conv(x)) + x.float()))
add_net("residual_of_integers", lambda self, x: self.act(self.norm(self.conv(x)) + (x > 0) + x.int()))
