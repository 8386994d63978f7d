"""Additions: which of them are residuals, and which only look like one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import (
    ADDED,
    ADDED_AFTER,
    NORMED,
    WHOLE,
    Draw,
    Group,
    TwoGroups,
    add,
    case,
    conv,
    two_images,
)


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
        return self.sum_of(self.act(self.norm(self.conv(x))), x)


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
    add(f"add_{_form}", lambda sum_of=_sum_of: Adds(sum_of), fused={"conv": ADDED})
    add(f"add_after_{_form}", lambda sum_of=_sum_of: AddsAfter(sum_of), fused={"conv": ADDED_AFTER})

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
for _form, _sum_of in NO_RESIDUALS.items():
    add(
        f"no_residual_{_form}",
        lambda sum_of=_sum_of: Adds(sum_of),
        # Here the shapes depend on the batch, so that FX cannot trace it.
        **({"traceable": False} if _form == "of_one_image" else {"fused": {"conv": NORMED}}),
    )


@case(fused={"conv": NORMED})
class ParameterPerChannel(Group):
    """A learned offset of shape [1, K, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.offset)


@case(draws=(Draw(1, 1, 8, 9), Draw(2, 3, 8, 9), Draw(3, 1, 8, 9)))
class ParameterOfTheExamplesShape(Group):
    """A position embedding: as large as the sum for one image, broadcast for three."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.linspace(-1, 1, 288).reshape(1, 4, 8, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.position)


@case(draws=(Draw(1, 2, 1, 1), Draw(2, 3, 8, 9), Draw(3, 1, 1, 7)))
class PooledResidual(Group):
    """Pooled to one pixel: as large as the sum for an image of one pixel, broadcast for others."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + F.adaptive_avg_pool2d(x, 1))


@case(
    draws=(Draw(1, 1, 8, 9), Draw(2, 3, 11, 7)),
    inputs=lambda draw: (draw.image(), draw.tensor(1, 4, draw.h, draw.w)),
)
class InputOfOneImage(Group):
    """A second input with a batch of one: the same size in the example only."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + residual)


@case(inputs=lambda draw: (draw.tensor(draw.n, 4, 3, 3), draw.image(salt=1)))
class SumBroadcastUp(nn.Module):
    """The convolution makes one pixel, which the addition spreads over the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + y)


@case(inputs=lambda draw: (draw.tensor(2, 4, 8, 9), draw.tensor(1, 2, 4, 8, 9, salt=1)))
class SumOfMoreDimensions(Group):
    """The residual has a dimension more."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + y)


@case(inputs=lambda draw: (draw.tensor(4, draw.h, draw.w),), fused={"conv": "conv + add + relu"})
class WithoutBatchDimension(Group):
    """[C, H, W] in, [K, P, Q] out; nn.BatchNorm2d takes no such image."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


@case(inputs=lambda draw: (draw.tensor(4, draw.h, draw.w), draw.image(salt=1)))
class ResidualWithABatchForOneImage(Group):
    """[K, P, Q] plus [N, K, P, Q]."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.conv(x) + y)


@case()
class ResidualOfHigherPrecision(Group):
    """float32 plus float64 is float64."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x.double())


@case()
class ResidualOfLowerPrecision(Group):
    """float64 plus float32 is float64: the residual is converted, not refused."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x.float())


@case()
class ResidualOfIntegers(Group):
    """A mask is added."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + (x > 0) + x.int())


@case()
class NormOutputPlusItself(Group):
    """z + z."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z + z)


@case()
class ActivatedPlusItself(Group):
    """act(z) + act(z)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y + y


@case(fused={"conv": NORMED})
class ResidualFromTheNormOutput(Group):
    """The residual waits for the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z + torch.sigmoid(z))


@case()
class ResidualFromTheConvOutput(Group):
    """The residual waits for the convolution's output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y) + y.tanh())


@case(fused={"conv": WHOLE, "conv2": ADDED})
class ResidualThroughAnotherGroup(TwoGroups):
    """a + second(a): the second can take the sum, the first cannot, since the second waits for it."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm(self.conv(x)))
        return self.act(a + self.norm2(self.conv2(a)))


@case()
class BothAreConvolutions(TwoGroups):
    """Only one of the two can take the addition; the other is its residual."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.norm2(self.conv2(x)))


@case()
class BothAreActivated(TwoGroups):
    """relu(a) + relu(b): neither activation may be lost or done twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.act(self.norm2(self.conv2(x)))


@case()
class OneIsActivated(TwoGroups):
    """relu(relu(a) + b)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.act(self.norm(self.conv(x))) + self.norm2(self.conv2(x)))


@case()
class BothAreTheSameGroup(Group):
    """The same modules on both sides of the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3))))


@case(fused={"conv": "conv + norm + add"})
class SumUsedTwice(Group):
    """The sum is needed before and after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        return self.act(y) * y.cos()


@case()
class SumReturned(Group):
    """The sum is an output as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)) + x
        return self.act(y), y


@case(inputs=two_images)
class ThreeOperands(Group):
    """z + x + y."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x + y)


@case(inputs=two_images)
class PythonSum(Group):
    """`sum` starts with 0 + z."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(sum([self.norm(self.conv(x)), x, y]))


@case()
class AddThenActThenActAgain(Group):
    """silu(relu(z) + x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.act(self.norm(self.conv(x))) + x)


@case()
class AddThenNorm(Group):
    """The norm stands behind the addition, so it is not the convolution's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x) + x))


@case(fused={"conv": "conv + add + relu"})
class AddWithoutNorm(Group):
    """A residual block without a norm."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


@case()
class ExpandedResidual(Group):
    """The residual has the shape of the sum, but one row in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x[:, :, :1].expand_as(x))


@case(fused={"conv": NORMED})
class ScaledBranch(Group):
    """A layer scale between the norm and the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 0.9, 4).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.gamma * self.norm(self.conv(x)))


class DropPath(nn.Module):
    """Drops the whole branch of some images, in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand_like(x[:, :1, :1, :1]) > 0.5)


class DroppedBranch(Group):
    """A stochastic branch before the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop_path(self.norm(self.conv(x))) + x)


add("drop_path_in_eval_mode", DroppedBranch, fused={"conv": ADDED})
add(
    "drop_path_in_training_mode",
    DroppedBranch,
    fused={"conv": NORMED},
    prepare=lambda network: network.drop_path.train(),
)


@case()
class ShortcutWithMoreChannels(nn.Module):
    """A shortcut padded in its channels, by a size that depends on the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(4, 6, stride=2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return F.relu(self.norm(self.conv(x)) + shortcut)


class Bottleneck(nn.Module):
    """torchvision's block: one ReLU module for all, `out += identity`, an optional shortcut convolution."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, 3, stride=stride, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, k, 1, bias=False), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if c != k or stride != 1:
            self.downsample = nn.Sequential(conv(c, k, 1, stride=stride), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


add(
    "bottlenecks",
    lambda: nn.Sequential(Bottleneck(4, 6, 2), Bottleneck(6, 6, 1)),
    fused={
        "0.conv1": WHOLE,
        "0.conv2": WHOLE,
        "0.conv3": ADDED,
        "0.downsample.0": NORMED,
        "1.conv1": WHOLE,
        "1.conv2": WHOLE,
        "1.conv3": ADDED,
    },
)
