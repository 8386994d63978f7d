"""Padding before a convolution: which of it a convolution can take over."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fusion_cases.case import ADDED, WHOLE, Group, TwoGroups, add, add_net, case, conv


class PadModule(Group):
    """A padding module, then the group."""

    def __init__(self, pad: nn.Module, **options: Any) -> None:
        super().__init__()
        self.pad = pad
        self.conv = nn.Conv2d(4, 4, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.pad(x))


class PadFunction(PadModule):
    """`F.pad`, then the group."""

    def __init__(self, size: Any, mode: str = "constant", value: Any = None, **options: Any) -> None:
        super().__init__(nn.Identity(), **options)
        self.arguments = (size, mode, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(F.pad(x, *self.arguments))


for _name, _make in {
    "zeros": lambda: PadModule(nn.ZeroPad2d(1)),
    "zeros_uneven": lambda: PadModule(nn.ZeroPad2d((0, 1, 2, 3))),
    "zeros_stride": lambda: PadModule(nn.ZeroPad2d((0, 1, 0, 1)), stride=2),
    "zeros_and_own": lambda: PadModule(nn.ZeroPad2d((2, 1, 0, 1)), padding=1),
    "zeros_and_reflection": lambda: PadModule(nn.ZeroPad2d(1), padding=1, padding_mode="reflect"),
    "zeros_and_same": lambda: PadModule(nn.ZeroPad2d(1), padding="same", dilation=2),
    "zeros_negative": lambda: PadModule(nn.ZeroPad2d(-1)),
    "zeros_negative_and_own": lambda: PadModule(nn.ZeroPad2d(-1), padding=1),
    "zeros_partly_negative": lambda: PadModule(nn.ZeroPad2d((2, -1, -1, 2)), padding=(1, 2)),
    "constant_zero": lambda: PadModule(nn.ConstantPad2d(1, 0.0)),
    "constant": lambda: PadModule(nn.ConstantPad2d(1, 0.7)),
    "reflection": lambda: PadModule(nn.ReflectionPad2d(1)),
    "replication": lambda: PadModule(nn.ReplicationPad2d((1, 2, 0, 1)), padding=1),
    "circular": lambda: PadModule(nn.CircularPad2d(1)),
    "function": lambda: PadFunction((1, 1, 1, 1)),
    "function_list": lambda: PadFunction([0, 1, 0, 1], stride=2),
    "function_width_only": lambda: PadFunction((2, 1)),
    "function_three_dimensions": lambda: PadFunction((1, 1, 1, 1, 0, 0)),
    "function_value_zero": lambda: PadFunction((1, 1, 1, 1), "constant", 0),
    "function_value": lambda: PadFunction((1, 1, 1, 1), "constant", -0.4),
    "function_reflect": lambda: PadFunction((1, 1, 1, 1), "reflect"),
    "function_negative": lambda: PadFunction((-1, -1, 1, 1), padding=1),
}.items():
    add(f"pad_{_name}", _make, fused=WHOLE)

for _mode in ("reflect", "replicate", "circular"):
    add(
        f"padding_mode_{_mode}",
        lambda mode=_mode: PadModule(nn.Identity(), padding=(1, 2), padding_mode=mode, stride=(2, 1)),
        fused=WHOLE,
    )

OPTIONS: dict[str, dict[str, Any]] = {
    "same": {"padding": "same"},
    "same_even": {"padding": "same", "size": 4},
    "same_dilated": {"padding": "same", "dilation": (2, 3)},
    "valid": {"padding": "valid"},
    "pairs": {"size": (3, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "bias": False},
    "pointwise": {"size": 1, "padding": 0},
}


class WithConv(Group):
    """A convolution of another kind in the usual place."""

    def __init__(self, size: Any = 3, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, size, **{"padding": 1, **options})


for _name, _options in OPTIONS.items():
    add(f"conv_{_name}", partial(WithConv, **_options), fused=WHOLE)


@case(fused=WHOLE)
class PadOutputTwice(PadFunction):
    """The padded image is needed by somebody else too."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        return self.first(padded) * padded[:, :, 1:-1, 1:-1].sin()


@case(fused=ADDED)
class PadAsResidual(PadFunction):
    """The padded image is the residual too."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        return self.act(self.norm(self.conv(padded)) + padded)


@case()
class PadOutputChanged(PadFunction):
    """The border is filled after padding."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        padded[:, :, 0] = 0.5
        return self.first(padded)


@case()
class InputChangedAfterPadding(PadFunction):
    """The padded image is a copy: it keeps what the input was."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        x.zero_()
        return self.first(padded)


add_net(
    "pad_channels",
    lambda self, x: F.relu(self.norm(self.conv(F.pad(x, (0, 0, 0, 0, 1, 1))))),
    nn.Module,
    {"conv": lambda: conv(6), "norm": lambda: nn.BatchNorm2d(4)},
    fused=WHOLE,
)


@case(fused=WHOLE)
class PadThenActivation(PadFunction):
    """Something between the padding and the convolution: sigmoid(0) is not 0."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(torch.sigmoid(F.pad(x, (1, 1, 1, 1))))))


@case(fused=WHOLE)
class PadTwice(PadModule):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.ZeroPad2d((0, 1, 0, 2))))


@case()
class PadByTheImagesSize(PadFunction):
    """TensorFlow's "same": how much depends on the image."""

    def __init__(self) -> None:
        super().__init__((0, 0, 0, 0), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = ((height + 1) // 2 - 1) * 2 + 3 - height
        columns = ((width + 1) // 2 - 1) * 2 + 3 - width
        padded = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.first(padded)


@case(
    TwoGroups,
    {
        "pad": lambda: nn.ZeroPad2d(1),
        "conv": lambda: nn.Conv2d(4, 4, 3),
        "conv2": lambda: nn.Conv2d(4, 4, 3),
    },
)
def shared_padded_input(self: Any, x: Tensor) -> Tensor:
    """One padding before two convolutions, which may both take it or neither."""
    padded = self.pad(x)
    return F.relu(self.norm(self.conv(padded))) * F.silu(self.second(padded))


class FunctionalNorm(nn.Module):
    """A convolution that is a module, with padding and a batch norm that are functions around it."""

    def __init__(self, layer: nn.Conv2d, pad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.conv, self.pad = layer, pad
        self.register_buffer("running_mean", torch.rand(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.pad) if self.pad else x
        return F.relu(F.batch_norm(self.conv(x), self.running_mean, self.running_var))


_PADDED = "pad + conv + norm + relu"
for _name, (_layer, _pad, _parts) in {
    "plain": (partial(conv), (), WHOLE),
    "groups": (partial(conv, groups=2), (), WHOLE),
    "same": (partial(conv, size=4, padding="same"), (), WHOLE),
    "zeros": (conv, (1, 2, 0, 1), _PADDED),
    "zeros_and_same": (partial(conv, padding="same"), (1, 2, 0, 1), WHOLE),
    "crop": (conv, (-1, 2, 0, 1), WHOLE),
    "reflect": (partial(conv, padding_mode="reflect"), (), None),
}.items():
    add(
        f"functional_norm_{_name}",
        partial(lambda layer, pad: FunctionalNorm(layer(), pad), _layer, _pad),
        **({"fused": {"conv": _parts}} if _parts else {"unfused": {"conv": ""}}),
    )
