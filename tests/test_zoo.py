"""The judge of the zoo, on networks with known counts; and the small networks of the zoo, judged."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.reference import relative_error
from tests.zoo.compare import FLOOR, compare, named_leaves
from tests.zoo.dataflow import Flow, observe

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
timm = pytest.importorskip("timm", reason="needs timm")

from tests.zoo import judge as judging  # noqa: E402
from tests.zoo import summary  # noqa: E402
from tests.zoo.judge import Result, judge  # noqa: E402
from tests.zoo.results import Kept  # noqa: E402

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


def flow_of(body: Callable[[Small, Tensor], Any], change: Callable[[Small], object] | None = None) -> Flow:
    network = Small(body).eval()
    if change is not None:
        change(network)
    return observe(network, (torch.randn(2, 4, 6, 6),))


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        (lambda m, x: m.norm(m.conv(x)), {"conv": "norm"}),
        (lambda m, x: m.frozen(m.conv(x)), {"conv": "frozen"}),
        (lambda m, x: m.norm_act(m.conv(x)), {"conv": "norm_act"}),
        (
            lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var),
            {"conv": "norm"},
        ),
        (lambda m, x: m.norm(m.conv(F.relu_(m.norm(m.conv(x))))), {"conv": "norm"}),
        (lambda m, x: m.norm2(m.other(m.norm(m.conv(x)))), {"conv": "norm", "other": "norm2"}),
        (lambda m, x: m.norm(x) + m.conv(x), {}),
        (lambda m, x: m.norm(m.up(x)), {}),
        (lambda m, x: m.norm(F.conv2d(x, m.conv.weight * 2)), {}),
        (lambda m, x: m.norm(F.relu(m.conv(x))), {}),
    ],
    ids=[
        "module",
        "frozen",
        "norm-act",
        "functional-norm",
        "same-pair-twice",
        "two",
        "norm-elsewhere",
        "transposed",
        "computed-weight",
        "activation-first",
    ],
)
def test_foldable_pairs(body: Callable[[Small, Tensor], Any], pairs: dict[str, str]) -> None:
    assert flow_of(body).pairs == pairs


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x)),
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
        lambda m, x: m.norm(m.conv(x)) + m.norm2(m.conv(x)),
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),
    ],
    ids=["returned", "read-again", "two-norms", "one-norm-for-two", "once-without"],
)
def test_no_pair_where_something_else_sees_it(body: Callable[[Small, Tensor], Any]) -> None:
    flow = flow_of(body)
    assert "conv" not in flow.pairs
    assert not any("conv" in names for names in flow.adds)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.register_forward_hook(lambda module, arguments, result: result * 2),
        lambda m: parametrizations.weight_norm(m.conv),
        lambda m: m.norm.train(),
        lambda m: m.norm.register_forward_pre_hook(lambda module, arguments: None),
        lambda m: setattr(m.other, "weight", m.conv.weight),
    ],
    ids=["hook", "parametrized", "training", "norm-hook", "weight-of-two"],
)
def test_no_pair_of_modules_that_do_more(change: Callable[[Small], object]) -> None:
    assert flow_of(lambda m, x: m.norm(m.conv(x)), change).pairs == {}


@pytest.mark.parametrize(
    ("body", "adds"),
    [
        (lambda m, x: F.relu(m.norm(m.conv(x)) + x), {("conv",)}),
        (lambda m, x: F.relu(x + m.norm(m.conv(x))), {("conv",)}),
        (lambda m, x: x + F.relu(m.norm(m.conv(x))), {("conv",)}),
        (lambda m, x: m.norm(m.conv(x)).add_(x), {("conv",)}),
        (lambda m, x: m.conv(x) + x, {("conv",)}),
        (lambda m, x: m.frozen(m.conv(x)) + x, {("conv",)}),
        (lambda m, x: m.norm(m.conv(x)) + m.norm2(m.other(x)), {("conv", "other")}),
        (lambda m, x: F.hardtanh(m.conv(x), -1, 1) + x, set()),
        (lambda m, x: F.relu6(m.conv(x)) + x, {("conv",)}),
        (lambda m, x: m.norm(m.conv(x)) + x.mean((2, 3), keepdim=True), set()),
        (lambda m, x: m.norm(m.conv(x)) + 1, set()),
        (lambda m, x: (lambda y: (y + x, y))(m.norm(m.conv(x))), set()),
        (lambda m, x: (lambda y: y + y)(m.norm(m.conv(x))), set()),
        (lambda m, x: F.max_pool2d(m.norm(m.conv(x)), 3, 1, 1) + x, set()),
    ],
    ids=[
        "add-act",
        "other-order",
        "act-add",
        "in-place",
        "no-norm",
        "frozen",
        "two-branches",
        "unknown-activation",
        "relu6",
        "broadcast",
        "number",
        "returned",
        "itself",
        "pooled",
    ],
)
def test_residual_adds(body: Callable[[Small, Tensor], Any], adds: set[tuple[str, ...]]) -> None:
    assert flow_of(body).adds == adds


def test_a_convolution_that_runs_twice_counts_once() -> None:
    flow = flow_of(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))))
    assert flow.convolutions == 1
    assert flow.calls == {"conv": 2}


def test_comparison() -> None:
    x = torch.randn(100, dtype=torch.float64)
    exact = {"x": x, "labels": torch.arange(3)}
    original = {"x": x.float(), "labels": torch.arange(3)}
    slightly = 0.9 * FLOOR
    assert compare({**original, "x": (x * (1 + slightly)).float()}, original, exact).wrong == []
    assert len(compare({**original, "x": (x * (1 + 1.2 * FLOOR)).float()}, original, exact).wrong) == 1
    assert len(compare({**original, "labels": torch.ones(3)}, original, exact).wrong) == 1
    assert len(compare({**original, "x": x.float()[:50]}, original, exact).wrong) == 1
    not_a_number = compare({**original, "x": x.float() * math.nan}, original, exact)
    assert not_a_number.wrong
    assert not_a_number.worst == math.inf
    assert compare({"x": x.float()}, original, exact).worst == math.inf


def test_bound_follows_the_error_of_the_original() -> None:
    x = torch.randn(100, dtype=torch.float64)
    original = (x * (1 + 1e-3)).float()
    assert relative_error(original, x) == pytest.approx(1e-3, rel=0.01)
    assert not compare({"x": (x * (1 + 2.9e-3)).float()}, {"x": original}, {"x": x}).wrong
    assert compare({"x": (x * (1 + 3.1e-3)).float()}, {"x": original}, {"x": x}).wrong


def test_leaves_of_nested_results() -> None:
    value = {"a": [torch.zeros(1), {"b": torch.ones(2)}], "c": (torch.zeros(3),), "d": None}
    assert list(named_leaves(value)) == ["output['a'][0]", "output['a'][1]['b']", "output['c'][0]"]


def plain_copy(network: nn.Module, arguments: Any) -> nn.Module:
    return copy.deepcopy(network)


def test_counts_of_a_network_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "reasons_of", lambda fused: {})
    result = judge("tv/resnet18", how=plain_copy)
    assert (result.convolutions, result.pairs, result.adds) == (20, 20, 8)
    assert result.traceable
    assert (result.fused_pairs, result.fused_adds) == (0, 0)
    assert len(result.missed_pairs) == 20
    assert len(result.missed_adds) == 8
    assert result.is_right


@pytest.mark.parametrize("victim", ["layer3.1.bn2", "layer1.0.relu", "layer4.1.bn1"])
def test_judge_sees_a_module_left_out(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "reasons_of", lambda fused: {})

    def fuse(network: nn.Module, arguments: Any) -> nn.Module:
        fused = copy.deepcopy(network)
        fused.set_submodule(victim, nn.Identity())
        return fused

    result = judge("tv/resnet18", how=fuse)
    assert any("relative error" in wrong for wrong in result.wrong)
    assert result.worst > judging.SPOILED


def test_judge_sees_another_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "reasons_of", lambda fused: {})

    def fuse(network: nn.Module, arguments: Any) -> nn.Module:
        fused = copy.deepcopy(network)
        fused.layer2[0].bn1.eps = 1e-3
        return fused

    assert judge("tv/resnet18", how=fuse).wrong


def test_judge_sees_a_changed_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "reasons_of", lambda fused: {})

    def fuse(network: nn.Module, arguments: Any) -> nn.Module:
        fused = copy.deepcopy(network)
        network.conv1.weight.data = network.conv1.weight.data.to(memory_format=torch.channels_last)
        return fused

    assert any("changed the original" in wrong for wrong in judge("tv/resnet18", how=fuse).wrong)


def test_judge_reports_what_is_raised() -> None:
    def fuse(network: nn.Module, arguments: Any) -> nn.Module:
        raise RuntimeError("no")

    result = judge("tv/resnet18", how=fuse)
    assert result.error == "RuntimeError at fuse: no"
    assert not result.is_right


# Beside attention that keeps biases in an attribute or branches on its input, and in a feature pyramid.
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
    assert len(result.missed_adds) == ADDS_IN_PYTHON.get(name, 0), result.missed_adds
    assert all("Python code" in why for _, why in result.missed_adds)
    assert ("norm" in result.spoiled) == (result.fused_pairs > 0)
    assert ("add" in result.spoiled) == (result.fused_adds > 0)


def test_results_are_kept_until_a_source_changes(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Kept(path, "a mark")
    first.add(Result("tv/resnet18", pairs=20, missed_pairs=[("conv1", "why")], worst=math.inf))
    first.add(Result("tv/vgg11", error="an error"))
    with path.open("a") as file:
        file.write('{"name": "tv/cut o')
    again = Kept(path, "a mark")
    assert list(again.results) == ["tv/resnet18", "tv/vgg11"]
    assert again.results["tv/resnet18"].worst == math.inf
    assert list(Kept(path, "a mark", frozenset({"tv/vgg11"})).results) == ["tv/resnet18"]
    assert Kept(path, "another mark").results == {}


def test_goals_and_document() -> None:
    good = Result("a", convolutions=20, pairs=20, fused_pairs=19, adds=10, fused_adds=9, traceable=True)
    untraceable = Result("b", adds=10, missed_adds=[("conv", "conv: its result goes to 2 places: x, y")])
    bad = Result("c", pairs=20, missed_pairs=[("conv", "conv: a | b")], wrong=["output: off"])
    assert summary.Totals([good, untraceable]).shortfalls() == []
    assert len(summary.Totals([good, bad]).shortfalls()) == 1
    assert summary.failures([good, untraceable]) == []
    assert summary.failures([bad]) == ["c: wrong: output: off"]
    text = summary.document([good, untraceable, bad], {"torch": "1"}, frozen=False)
    assert "| foldable pairs fused | 19 of 40 (47.5 %) |" in text
    assert "| conv: its result goes to 2 places | 1 | `b conv` |" in text
    assert "| a | 20 | 19 of 20 | 9 of 10 | yes |" in text
