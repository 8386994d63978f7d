"""Modules, parameters and results that are used in more than one place, or in none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import (
    ADDED,
    ADDED_AFTER,
    NORMED,
    WHOLE,
    Group,
    TwoGroups,
    add,
    case,
    conv,
    two_images,
)

SHARED = r"(?i)twice|more than once|times|shared?|several|elsewhere|again|two|other|also|places"


@case(fused={"conv": (WHOLE, ADDED_AFTER)})
class SharedConv(TwoGroups):
    """One convolution under two norms, each with a place of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.act(self.norm2(self.conv(x * 0.5)))


@case(fused={"conv": (WHOLE, "conv + add")})
class SharedConvOnceBare(Group):
    """One convolution, once under a norm and once without."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.conv(x * 0.5)


@case(fused={"conv": (WHOLE, ADDED_AFTER)})
class SharedConvByAnotherName(TwoGroups):
    """One convolution under two attribute names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.act(self.norm2(self.conv2(x * 0.5)))


@case(fused={"conv": WHOLE, "conv2": ADDED_AFTER})
class SharedNorm(TwoGroups):
    """One norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm2

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.act(self.norm(self.conv2(x)))


@case(fused={"conv": ADDED_AFTER})
class SharedNormOnceAlone(Group):
    """One norm, behind a convolution and on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + self.norm(x)


@case(fused={"conv": WHOLE, "conv2": WHOLE})
class SharedActivation(TwoGroups):
    """One activation module for all: it holds nothing, so sharing it hinders nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.conv2(self.act(self.norm(self.conv(x))))))


@case(fused={"conv": WHOLE})
class SameGroupThreeTimes(Group):
    """Recurrence: the same group each time, so all three places can be fused."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.norm(self.conv(x)))
        return x


class Branches(nn.Module):
    """The same block on several inputs, as detection heads do on pyramid levels."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Group()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.block(level) for level in (x, F.avg_pool2d(x, 2), x[:, :, 1:])]


add("same_block_on_several_levels", Branches, fused={"block.conv": WHOLE})


class SharedHead(nn.Module):
    """A head whose convolutions all levels share, each with norms of its own, as EfficientDet has it."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv()])
        self.norms = nn.ModuleList(
            [nn.ModuleList([nn.BatchNorm2d(4) for _ in self.convs]) for _ in range(levels)]
        )
        self.predict = conv(4, 2)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        results = []
        for x, norms in zip(features, self.norms, strict=True):
            for layer, norm in zip(self.convs, norms, strict=True):
                x = F.silu(norm(layer(x)))
            results.append(self.predict(x))
        return results


class Detector(nn.Module):
    """The head on three levels that the network makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SharedHead()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.head([x, F.avg_pool2d(x, 2), x[:, :, 1:]])


LEVELS = ("conv + norm + silu",) * 3
add("shared_head", Detector, fused={"head.convs.0": LEVELS, "head.convs.1": LEVELS})
add(
    "shared_head_on_a_list",
    SharedHead,
    fused={"convs.0": LEVELS, "convs.1": LEVELS},
    inputs=lambda draw: ([draw.image(salt=level) for level in range(3)],),
)


@case(fused={"embed.conv": (WHOLE, WHOLE), "embed.conv2": (NORMED, NORMED)}, inputs=two_images)
class Siamese(nn.Module):
    """Two images through one network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = TwoGroups()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.one(x), self.one(y)
        return (first - second).square().mean((1, 2, 3))

    def one(self, x: Tensor) -> Tensor:
        return self.embed.norm2(self.embed.conv2(self.embed(x)))


class FrozenBatchNorm2d(nn.Module):
    """As DETR and its followers write it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        eps = 1e-5
        scale = w * (rv + eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


@case(fused={"conv": WHOLE, "conv2": ADDED})
class FrozenNorms(TwoGroups):
    """Norms that are arithmetic, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = FrozenBatchNorm2d(4), FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.conv2(super().forward(x))) + x)


@case(fused={"conv": ("conv + norm", "conv + norm + relu")})
class FrozenNormShared(FrozenNorms):
    """One of them behind two calls of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.norm(self.conv(x)))))


@case(fused={"conv": (WHOLE, "conv + norm + silu")})
class SameConvAndNormOtherActivation(Group):
    """The same convolution and norm in two places, but not the same group."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(self.act(self.norm(self.conv(x))))))


@case(fused={"conv": (WHOLE, ADDED)})
class SameGroupOnceWithResidual(Group):
    """The same modules, only once with a residual."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return self.act(self.norm(self.conv(y)) + x)


@case(fused={"conv": (WHOLE, "conv")})
class SameGroupOnceTapped(Group):
    """The same modules twice, but the second time the convolution's output is returned as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.act(self.norm(self.conv(x)))
        tapped = self.conv(y)
        return self.act(self.norm(tapped)), tapped


@case(fused={"conv": NORMED})
class NormOutputTwice(Group):
    """The norm's output is used before and after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.act(z) * 0.5 + z.sin()


@case(unfused={"conv": SHARED})
class ConvOutputTwice(Group):
    """The convolution's output is needed without the norm as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.norm(y)) * y.cos()


@case(unfused={"conv": SHARED + "|return|output"})
class ConvOutputReturned(Group):
    """A feature tap: the convolution's output is an output of the network."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.act(self.norm(y)), y


@case(unfused={"conv": SHARED + "|return|output"})
class ConvOutputInADictionary(Group):
    """The same, inside a nested result."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = {"raw": [self.conv(x)]}
        return {"y": self.act(self.norm(features["raw"][0])), "features": features}


@case(fused={"conv": NORMED})
class NormOutputReturned(Group):
    """The value before the activation is an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.norm(self.conv(x))
        return self.act(z), z


@case(attributes=("last",))
class ConvOutputKept(Group):
    """A feature tap by assignment: no data flow shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.act(self.norm(self.last))


@case(attributes=("history",))
class ConvOutputAppended(Group):
    """A feature tap into a list that the network keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.history.append(y.detach().mean())
        return self.act(self.norm(y))


@case()
class ConvOutputForItsShape(Group):
    """The convolution's output is asked for its size later on."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.act(self.norm(y))
        return z.reshape(y.shape[0], y.size(1), -1).mean(-1) * y.shape[2]


@case(fused={"conv": WHOLE, "conv2": WHOLE})
class SharedWeight(TwoGroups):
    """Two convolutions with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.conv2(self.act(self.norm(self.conv(x))))))


@case()
class SharedWeightWithAFunction(Group):
    """A convolution whose weight a functional call uses as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x))) + F.conv2d(x, self.conv.weight.flip(2, 3), None, 1, 1)


@case()
class SharedNormParameters(TwoGroups):
    """Two norms with their affine parameters in common."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2.weight, self.norm2.bias = self.norm.weight, self.norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm2(self.conv2(self.act(self.norm(self.conv(x))))))


@case()
class TwoNamesOnePlace(Group):
    """Registered under two names, called in one place; checkpoints hold both names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias, self.norm_alias = self.conv, self.norm


@case(fused={"conv": WHOLE}, unused_norms=("norm2",))
class NeverCalled(TwoGroups):
    """A head that is only used in training: its parameters have to stay."""


@case(fused={"conv2": WHOLE}, prepare=lambda network: network.norm.train(), unused_norms=("norm",))
class ResultNotUsed(TwoGroups):
    """A call for its side effect alone: the norm is in training mode, and its statistics have to move."""

    def forward(self, x: Tensor) -> Tensor:
        self.norm(self.conv(x))
        return self.act(self.norm2(self.conv2(x)))


@case(unfused={"conv": SHARED})
class ConvOutputInParts(Group):
    """Half of the convolution's output goes another way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        left, _ = y.chunk(2, 1)
        return self.act(self.norm(y)) + torch.cat([left, left], 1)


@case(fused={"conv": ADDED, "conv2": WHOLE})
class SharedInput(TwoGroups):
    """What the convolutions read is shared by all, which is no hindrance."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x) * self.act(self.norm2(self.conv2(x)))


@case(fused={"conv": WHOLE, "conv2": WHOLE})
class Dense(nn.Module):
    """Concatenations, each of everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = conv(8), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        features.append(F.relu(self.norm(self.conv(torch.cat(features, 1)))))
        features.append(F.relu(self.norm2(self.conv2(torch.cat(features, 1)))))
        return torch.cat(features, 1)
