"""The judge of the zoo, on networks with known counts; and the small networks of the zoo, judged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.dataflow import observe

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
timm = pytest.importorskip("timm", reason="needs timm")

from tests.zoo import judge as judging  # noqa: E402
from tests.zoo import summary  # noqa: E402
from tests.zoo.judge import Result, judge  # noqa: E402

# Small, and one at least of every way that the libraries write convolution, norm, activation and addition.
FAST = (
    "timm/cs3darknet_m",
    "timm/cspnext_s",
    "timm/densenetblur121d",
    "timm/efficientvit_b0",
    "timm/ghostnet_100",
    "timm/lcnet_100",
    "timm/levit_conv_128",
    "timm/mobilenetv3_small_100",
    "timm/mobileone_s1",
    "timm/repghostnet_100",
    "timm/resnetv2_50d_gn",
    "timm/tf_mobilenetv3_large_100",
    "tv/densenet121",
    "tv/googlenet",
    "tv/mobilenet_v2",
    "tv/regnet_y_400mf",
    "tv/resnet18",
    "tv/shufflenet_v2_x0_5",
    "tvdet/fasterrcnn_mobilenet_v3_large_320_fpn",
    "tvseg/lraspp_mobilenet_v3_large",
)


class Small(nn.Module):
    """Two convolutions and norms, called as `body` says."""

    def __init__(self, body: Callable[["Small", Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norm, self.norm2 = (nn.BatchNorm2d(4) for _ in range(2))
        self.frozen = torchvision.ops.FrozenBatchNorm2d(4)
        self.norm_act = timm.layers.BatchNormAct2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


Adds = set[tuple[str, ...]]
NORMED, ADDED = {"conv": "norm"}, {("conv",)}
COUNTS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str], Adds]] = {
    "module": (lambda m, x: m.norm(m.conv(x)), NORMED, set()),
    "norm-act": (lambda m, x: m.norm_act(m.conv(x)), {"conv": "norm_act"}, set()),
    "same pair twice": (lambda m, x: m.norm(m.conv(F.relu_(m.norm(m.conv(x))))), NORMED, set()),
    "norm elsewhere": (lambda m, x: m.norm(x) + m.conv(x), {}, ADDED),
    "transposed": (lambda m, x: m.norm(m.up(x)), {}, set()),
    "computed weight": (lambda m, x: m.norm(F.conv2d(x, m.conv.weight * 2)), {}, set()),
    "activation first": (lambda m, x: m.norm(F.relu(m.conv(x))), {}, set()),
    "returned": (lambda m, x: (m.norm(y := m.conv(x)), y), {}, set()),
    "two norms": (lambda m, x: m.norm(m.conv(x)) + m.norm2(m.conv(x)), {}, set()),
    "one norm for two": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), {}, set()),
    "add, activation": (lambda m, x: F.relu(x + m.norm(m.conv(x))), NORMED, ADDED),
    "activation, add": (lambda m, x: F.relu6(m.norm(m.conv(x))).add_(x), NORMED, ADDED),
    "frozen": (lambda m, x: m.frozen(m.conv(x)) + x, {"conv": "frozen"}, ADDED),
    "two branches": (
        lambda m, x: m.norm(m.conv(x)) + m.norm2(m.other(x)),
        {"conv": "norm", "other": "norm2"},
        {("conv", "other")},
    ),
    "unknown activation": (lambda m, x: F.hardtanh(m.conv(x), -1, 1) + x, {}, set()),
    "broadcast": (lambda m, x: m.norm(m.conv(x)) + x.mean((2, 3), keepdim=True), NORMED, set()),
    "number": (lambda m, x: m.norm(m.conv(x)) + 1, NORMED, set()),
    "itself": (lambda m, x: (y := m.norm(m.conv(x))) + y, NORMED, set()),
}


@pytest.mark.parametrize(("body", "pairs", "adds"), COUNTS.values(), ids=COUNTS)
def test_counts(body: Callable[[Any, Tensor], Any], pairs: dict[str, str], adds: Adds) -> None:
    flow = observe(Small(body).eval(), (torch.randn(2, 4, 6, 6),))
    assert (flow.pairs, flow.adds) == (pairs, adds)


CHANGES: dict[str, Callable[[Small], object]] = {
    "hook": lambda m: m.conv.register_forward_hook(lambda module, arguments, result: result * 2),
    "parametrized": lambda m: parametrizations.weight_norm(m.conv),
    "training": lambda m: m.norm.train(),
    "weight of two": lambda m: setattr(m.other, "weight", m.conv.weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_pair_of_modules_that_do_more(change: Callable[[Small], object]) -> None:
    network = Small(lambda m, x: m.norm(m.conv(x))).eval()
    change(network)
    assert observe(network, (torch.randn(2, 4, 6, 6),)).pairs == {}


SPOILT: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "nothing": (lambda network, fused: None, ""),
    "a norm": (lambda network, fused: fused.layer3[1].set_submodule("bn2", nn.Identity()), "relative error"),
    "a ReLU": (lambda network, fused: fused.layer1[0].set_submodule("relu", nn.Identity()), "relative error"),
    "an eps": (lambda network, fused: setattr(fused.layer2[0].bn1, "eps", 1e-3), "relative error"),
    "the original": (lambda network, fused: network.to(memory_format=torch.channels_last), "the original"),
    "all": (lambda network, fused: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_the_judge_sees_what_was_spoilt(
    spoil: Callable[[Any, Any], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counts nothing as fused that was not."""
    monkeypatch.setattr(judging, "reasons_of", lambda fused: {})

    def fuse(network: nn.Module, arguments: Any) -> nn.Module:
        fused = copy.deepcopy(network)
        spoil(network, fused)
        return fused

    result = judge("tv/resnet18", how=fuse)
    assert (result.convolutions, result.pairs, result.adds) == (20, 20, 8)
    assert (result.fused_pairs, result.fused_adds) == (0, 0)
    assert any(words in failure for failure in summary.failures([result])) == bool(words)
    if not result.error:
        assert (len(result.missed_pairs), len(result.missed_adds)) == (20, 8)


# In a feature pyramid, and beside attention that keeps biases in an attribute or branches on its input.
ADDS_IN_PYTHON = {
    "timm/efficientvit_b0": 4,
    "timm/levit_conv_128": 26,
    "tvdet/fasterrcnn_mobilenet_v3_large_320_fpn": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_fused_networks(name: str) -> None:
    result = judge(name, frozen=judging.fuse_frozen)
    assert summary.failures([result]) == []
    assert result.missed_pairs == []
    assert len(result.missed_adds) <= ADDS_IN_PYTHON.get(name, 0), result.missed_adds
    assert ("norm" in result.spoiled) == (result.fused_pairs > 0)
    assert ("add" in result.spoiled) == (result.fused_adds > 0)


def test_goals_and_document() -> None:
    good = Result("a", convolutions=20, pairs=20, fused_pairs=20, adds=100, fused_adds=99)
    bad = Result("c", pairs=20, missed_pairs=[("conv", "conv: a | b: c")], wrong=["output: off"])
    assert (summary.shortfalls([good]), len(summary.shortfalls([good, bad]))) == ([], 1)
    assert summary.failures([good, bad]) == ["c: wrong: output: off"]
    text = summary.document([good, bad], {"torch": "1"}, frozen=False)
    assert "| foldable pairs fused | 20 of 40 (50.0 %) |" in text
    assert "| conv: a / b | 1 | `c conv` |" in text
    assert "| a | 20 | 20 of 20 | 99 of 100 |" in text
