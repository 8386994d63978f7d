"""Containers that people and libraries put the three modules in, and networks that are one already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fusion_cases.case import ADDED, NORMED, WHOLE, Group, TwoGroups, add, add_net, case, conv


class YoloConv(nn.Module):
    """conv, bn, act under these names, with a second forward for networks whose norms are folded."""

    default_act = nn.SiLU()

    def __init__(self, c: int, k: int, size: int = 1, stride: int = 1, act: Any = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(k)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class YoloBottleneck(nn.Module):
    """x + cv2(cv1(x)): the addition stands behind the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = YoloConv(4, 4, 3), YoloConv(4, 4, 3)
        self.add = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class YoloC2f(nn.Module):
    """A list that grows while the blocks run, from a split that yields views."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = YoloConv(4, 8), YoloConv(16, 4)
        self.m = nn.ModuleList([YoloBottleneck(), YoloBottleneck()])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


SILU = "conv + norm + silu"
add(
    "yolo_conv",
    lambda: nn.Sequential(YoloConv(4, 4, 3), YoloConv(4, 4, act=False)),
    fused={"0.conv": SILU, "1.conv": NORMED},
)
add(
    "yolo_block",
    YoloC2f,
    fused={
        "cv1.conv": SILU,
        "cv2.conv": SILU,
        "m.0.cv1.conv": SILU,
        "m.0.cv2.conv": SILU + " + add",
        "m.1.cv2.conv": SILU + " + add",
    },
)


class ConvModule(nn.Module):
    """The order is a setting, the norm is found by a name kept beside it, forward can skip each part."""

    def __init__(
        self, order: tuple[str, ...] = ("conv", "norm", "act"), explicit_padding: str | None = None
    ) -> None:
        super().__init__()
        self.order = order
        self.conv = nn.Conv2d(4, 4, 3, padding=0 if explicit_padding else 1)
        self.padding_layer = nn.ReflectionPad2d(1) if explicit_padding else None
        self.norm_name = "bn"
        self.add_module("bn", nn.BatchNorm2d(4))
        self.activate = nn.ReLU(inplace=True)
        self.with_norm, self.with_activation = True, True

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                if self.padding_layer is not None:
                    x = self.padding_layer(x)
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class ConvModules(nn.Module):
    """Forward leaves out the activation of one and the norm of another, by argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvModule(), ConvModule(), ConvModule()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x), activate=False) + x, norm=False)


add("conv_module", ConvModule, fused=WHOLE)
add("conv_module_explicit_padding", partial(ConvModule, explicit_padding="reflect"), fused=WHOLE)
add("conv_module_norm_first", partial(ConvModule, ("norm", "act", "conv")), unfused="")
add("conv_module_norm_last", partial(ConvModule, ("conv", "act", "norm")), fused="conv + relu")
add(
    "conv_modules_by_argument",
    ConvModules,
    fused={"a.conv": WHOLE, "b.conv": "conv + norm + add", "c.conv": "conv + relu"},
)


class HandWritten(nn.Sequential):
    """The three modules in a sequence with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("conv", conv())
        self.add_module("norm", nn.BatchNorm2d(4))
        self.add_module("act", nn.ReLU6(inplace=True))


add("hand_written_sequence", HandWritten, fused="conv + norm + relu6")
add("root_is_a_sequence", lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), fused={"0": WHOLE})
add("root_is_a_convolution", conv)
add("root_is_fused_already", lambda: fused_cna.ConvNormAct(4, 4))
add("root_is_a_trace", lambda: torch.fx.symbolic_trace(Group().eval()), fused=WHOLE)
add(
    "root_is_a_residual_trace", lambda: torch.fx.symbolic_trace(TraceMe().eval()), fused={"block.conv": ADDED}
)


class TraceMe(nn.Module):
    """A block under a name, so that the trace has nested names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Group()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block.norm(self.block.conv(x)) + x)


# One layer was swapped by hand before.
add_net(
    "with_fused_modules_inside",
    lambda self, x: self.ready(self.first(x), residual=x),
    Group,
    {"ready": lambda: fused_cna.ConvNormAct(4, 4, act=nn.SiLU)},
    fused=WHOLE,
)


@case(fused={"outer.conv": WHOLE})
class Nested(nn.Module):
    """Blocks in blocks, the same class at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = TwoGroups()
        self.outer.norm2 = nn.Sequential(Group(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.norm2(self.outer(x)) + self.outer.conv2(x)


def of(library: str, make: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Makes a network from a library that may not be there."""

    def build() -> nn.Module:
        return make(pytest.importorskip(library, reason=f"needs {library}"))

    return build


class WithNorm(Group):
    """A library's norm in the usual place; those of timm hold the activation."""

    def __init__(self, norm: nn.Module, act: nn.Module | None = None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.act = nn.Identity() if act is None else act
        if layer is not None:
            self.conv = layer


TORCHVISION: dict[str, tuple[Callable[[Any], nn.Module], dict[str, str]]] = {
    "conv2d_norm_activation": (lambda ops: ops.Conv2dNormActivation(4, 4), {"0": WHOLE}),
    "conv2d_norm_activation_bare": (
        lambda ops: ops.Conv2dNormActivation(4, 4, norm_layer=None, activation_layer=nn.Hardswish),
        {"0": "conv + hardswish"},
    ),
    "frozen_batch_norm": (
        lambda ops: WithNorm(ops.FrozenBatchNorm2d(4, eps=0.1), nn.ReLU()),
        {"conv": WHOLE},
    ),
    "squeeze_excitation": (
        lambda ops: nn.Sequential(conv(), nn.BatchNorm2d(4), ops.SqueezeExcitation(4, 2)),
        {"0": NORMED, "2.fc1": "conv + relu", "2.fc2": "conv + sigmoid"},
    ),
    "stochastic_depth": (
        lambda ops: WithNorm(nn.BatchNorm2d(4), ops.StochasticDepth(0.5, "row")),
        {"conv": NORMED},
    ),
}
for _name, (_make, _fused) in TORCHVISION.items():
    add(f"torchvision_{_name}", of("torchvision.ops", _make), fused=_fused)

TIMM: dict[str, tuple[Callable[[Any], nn.Module], dict[str, str]]] = {
    "conv_norm_act": (lambda layers: layers.ConvNormAct(4, 4, 3), {"conv": WHOLE}),
    "conv_norm_act_linear": (lambda layers: layers.ConvNormAct(4, 4, 1, apply_act=False), {"conv": NORMED}),
    "conv_bn_act": (lambda layers: layers.ConvBnAct(4, 4, 3, act_layer=nn.SiLU), {"conv": SILU}),
    "batch_norm_act": (lambda layers: WithNorm(layers.BatchNormAct2d(4)), {"conv": WHOLE}),
    "batch_norm_act_silu": (
        lambda layers: WithNorm(layers.BatchNormAct2d(4, act_layer=nn.SiLU)),
        {"conv": SILU},
    ),
    "batch_norm_without_act": (
        lambda layers: WithNorm(layers.BatchNormAct2d(4, apply_act=False)),
        {"conv": NORMED},
    ),
    "batch_norm_act_then_act": (
        lambda layers: WithNorm(layers.BatchNormAct2d(4), nn.SiLU()),
        {"conv": WHOLE},
    ),
    "frozen_batch_norm_act": (
        lambda layers: WithNorm(layers.FrozenBatchNormAct2d(4, eps=0.1)),
        {"conv": WHOLE},
    ),
    "frozen_batch_norm": (
        lambda layers: WithNorm(layers.norm_act.FrozenBatchNormAct2d(4, apply_act=False), nn.ReLU()),
        {"conv": WHOLE},
    ),
    "conv2d_same": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), nn.ReLU(), layers.Conv2dSame(4, 4, 3, stride=2)),
        {"conv": WHOLE},
    ),
    "conv2d_same_even": (
        lambda layers: WithNorm(
            nn.BatchNorm2d(4), nn.ReLU(), layers.Conv2dSame(4, 4, 4, stride=3, dilation=2)
        ),
        {"conv": WHOLE},
    ),
    "swish": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.Swish(inplace=True)), {"conv": SILU}),
    "hard_swish": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), layers.HardSwish()),
        {"conv": "conv + norm + hardswish"},
    ),
    "hard_sigmoid": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), layers.HardSigmoid()),
        {"conv": "conv + norm + hardsigmoid"},
    ),
    "mish": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.Mish()), {"conv": "conv + norm + mish"}),
    "sigmoid": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), layers.Sigmoid(True)),
        {"conv": "conv + norm + sigmoid"},
    ),
    "tanh": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.Tanh()), {"conv": "conv + norm + tanh"}),
    "gelu": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.GELU()), {"conv": "conv + norm + gelu"}),
    "gelu_tanh": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), layers.GELUTanh()),
        {"conv": "conv + norm + gelu_tanh"},
    ),
    "prelu": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.PReLU()), {"conv": NORMED}),
    "hard_mish": (lambda layers: WithNorm(nn.BatchNorm2d(4), layers.HardMish()), {"conv": NORMED}),
    "squeeze_excite": (
        lambda layers: nn.Sequential(
            conv(), layers.BatchNormAct2d(4), layers.SqueezeExcite(4, rd_channels=2)
        ),
        {"0": WHOLE, "2.fc1": "conv + relu", "2.fc2": "conv + sigmoid"},
    ),
    "group_norm_act": (lambda layers: WithNorm(layers.GroupNormAct(4, 2)), {}),
    "batch_norm_act_with_drop": (
        lambda layers: WithNorm(layers.BatchNormAct2d(4, drop_layer=nn.Dropout2d)),
        {},
    ),
    "std_conv": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), nn.ReLU(), layers.StdConv2d(4, 4, 3, padding=1)),
        {},
    ),
    "scaled_std_conv_same": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), nn.ReLU(), layers.ScaledStdConv2dSame(4, 4, 3)),
        {},
    ),
    "mixed_conv": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), nn.ReLU(), layers.MixedConv2d(4, 4, [3, 5])),
        {},
    ),
    "blur_pool": (lambda layers: nn.Sequential(Group(), layers.BlurPool2d(4)), {"0.conv": WHOLE}),
    "drop_path": (
        lambda layers: WithNorm(nn.BatchNorm2d(4), nn.Sequential(layers.DropPath(0.3), nn.ReLU())),
        {"conv": WHOLE},
    ),
}
# torch's own hardsigmoid has a derivative of float32 precision, timm's has not.
TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "hard_sigmoid": {"tolerance": 1e-8},
    "std_conv": {"unfused": {"conv": ""}},
    "scaled_std_conv_same": {"unfused": {"conv": ""}},
}
for _name, (_make, _fused) in TIMM.items():
    add(f"timm_{_name}", of("timm.layers", _make), fused=_fused, **TIMM_OPTIONS.get(_name, {}))
add(
    "timm_batch_norm_act_in_training_mode",
    of("timm.layers", TIMM["batch_norm_act"][0]),
    unfused=r"(?i)train",
    prepare=lambda network: network.norm.train(),
)
add(
    "timm_batch_norm_act_dropping_in_training_mode",
    of("timm.layers", TIMM["batch_norm_act_with_drop"][0]),
    prepare=lambda network: network.norm.drop.train(),
)
