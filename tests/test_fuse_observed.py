"""Fusing networks that torch.fx cannot follow, by observing one run of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_cna
from fused_cna import ops
from fused_cna.fusion.records import NAME, FusionError
from tests.observed import (
    Calls,
    assert_same,
    chain,
    image,
    layers_of,
    observed,
    parts_of,
    randomized,
    untraceable,
)


@pytest.fixture(autouse=True)
def _groups_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "operator_everywhere", True)


def test_groups_are_fused() -> None:
    plain = untraceable(chain)
    fused = observed(plain, strict=True)
    assert parts_of(fused) == {"conv1": "conv + norm + relu", "conv2": "conv + norm + relu"}
    assert_same(fused, plain, image(3))
    with torch.inference_mode(), Calls() as calls:
        y = fused(image(3))
    assert (calls.fused, calls.norms) == (2, 0)
    assert type(y) is Tensor


def test_without_kernels_and_with_gradients_modules_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = observed(untraceable(chain))
    with Calls() as calls:
        fused(image()).sum().backward()
    assert calls.fused == 0
    monkeypatch.setattr(ops, "operator_everywhere", False)
    with torch.inference_mode(), Calls() as calls:
        fused(image())
    assert (calls.fused, calls.norms) == (0, 2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "method": (lambda z: z.relu(), "relu"),
    "method in place": (lambda z: z.sigmoid_(), "sigmoid"),
    "F.silu": (F.silu, "silu"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.3), "leaky_relu"),
    "F.elu": (lambda z: F.elu(z, alpha=0.5), "elu"),
    "F.gelu": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.hardtanh": (lambda z: F.hardtanh(z, 0.0, 6.0), "relu6"),
    "clamp": (lambda z: z.clamp(0, 6), "relu6"),
    "F.hardswish": (F.hardswish, "hardswish"),
    "torch.tanh": (torch.tanh, "tanh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions_of_python_code_join(name: str) -> None:
    function, act = FUNCTIONS[name]
    plain = untraceable(
        lambda net, x: function(net.bn1(net.conv1(x))) + function(net.conv2(x.repeat(1, 2, 1, 1))).sum()
    )
    fused = observed(plain)
    assert parts_of(fused) == {"conv1": f"conv + norm + {act}", "conv2": f"conv + {act}"}
    assert_same(fused, plain, image(3))
    with torch.inference_mode(), Calls() as calls:
        fused(image(3))
    assert (calls.fused, calls.norms) == (2, 0)


def test_keywords_and_unbatched_images() -> None:
    plain = untraceable(lambda net, x: net.relu(input=net.bn1(input=net.conv1(x))))
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    assert_same(fused, plain, image())
    plain = untraceable(lambda net, x: net.bn2(net.relu(net.conv1(x))[None]))
    assert_same(observed(plain, image(2, 3, 8, 9)), plain, image(2, 3, 8, 9))
    plain = untraceable(lambda net, x: net.bn1(net.conv1(input=x)))
    assert_same(observed(plain), plain, image())


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.jit.script
def scripted_mean(x: Tensor) -> Tensor:
    return x.mean() + 1


def keep(net: Any, y: Tensor) -> Tensor:
    net.kept = [y]
    return y


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "returned": (lambda net, x: (y := net.conv1(x), net.bn1(y)), "bn1 (BatchNorm2d), the output"),
    "returned in a dict": (
        lambda net, x: {"y": (y := net.conv1(x)), "z": net.bn1(y)},
        "bn1 (BatchNorm2d), the output",
    ),
    "kept": (lambda net, x: net.bn1(keep(net, net.conv1(x))), "bn1 (BatchNorm2d), what_is_kept"),
    "used twice": (lambda net, x: net.bn1(y := net.conv1(x)) + y, "bn1 (BatchNorm2d), add"),
    "used by a method": (lambda net, x: net.bn1(y := net.conv1(x)) * y.mean(), "bn1 (BatchNorm2d), mean"),
    "used by scripted code": (
        lambda net, x: net.bn1(y := net.conv1(x)) * scripted_mean(y),
        "bn1 (BatchNorm2d), mean",
    ),
    "looked at": (
        lambda net, x: net.bn1(y := net.conv1(x)) * y[0, 0, 0, 0].item(),
        "bn1 (BatchNorm2d), __getitem__",
    ),
    "added to": (lambda net, x: net.relu(net.conv1(x) + 1), "its result goes to add"),
    "added": (lambda net, x: net.conv1(x) + x.mean(1, True), "what follows is an addition in Python code"),
    "another norm": (lambda net, x: net.bn1(net.conv1(x)) + net.bn2(net.conv1(x)), "more than once"),
    "never called": (lambda net, x: net.bn1(x.repeat(1, 2, 1, 1)), "did not run for the example inputs"),
    "norm as a function": (
        lambda net, x: F.batch_norm(net.conv1(x), net.bn1.running_mean, net.bn1.running_var),
        "its norm is a function",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left_alone_and_why(name: str) -> None:
    between, reason = REFUSED[name]
    plain = untraceable(between)
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv"
    assert reason in layers_of(fused)["conv1"].reason
    assert_same(fused, plain, image())


def hooked(net: Any) -> None:
    net.bn1.register_forward_hook(lambda module, args, z: z + args[0])


def parametrized(net: Any) -> None:
    parametrizations.weight_norm(net.conv1)


def overridden(net: Any) -> None:
    net.conv1 = Doubling(3, 6, 3, padding=1).double()


def without_statistics(net: Any) -> None:
    net.bn1 = nn.BatchNorm2d(6, track_running_stats=False).double().eval()


@pytest.mark.parametrize("change", [hooked, parametrized, overridden, without_statistics])
def test_special_modules_are_left_alone(change: Callable[[Any], None]) -> None:
    plain = untraceable(lambda net, x: net.bn1(net.conv1(x)))
    change(plain)
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv"
    assert layers_of(fused)["conv1"].reason
    assert_same(fused, plain, image())


def test_shared_modules() -> None:
    """A convolution may run often, if always with the same norm; activations may be shared by anyone."""

    def between(net: Any, x: Tensor) -> Tensor:
        y = net.relu(net.bn1(net.conv1(x)))
        y = net.relu(y + net.relu(net.bn1(net.again(y[:, :3]))))
        return y.flatten(1).sum(1)

    plain = untraceable(between)
    plain.again = plain.conv1
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    assert_same(fused, plain, image())

    plain = untraceable(lambda net, x: net.relu(net.bn1(net.conv1(x))) + net.act(net.bn1(net.conv1(-x))))
    plain.act = nn.ReLU()
    fused = observed(plain)
    assert parts_of(fused)["conv1"] == "conv + norm"
    assert_same(fused, plain, image())


def test_checkpoints_both_ways() -> None:
    plain = untraceable(chain)
    fused = observed(plain)
    state = fused.state_dict()
    assert list(state) == list(plain.state_dict())
    assert state._metadata == plain.state_dict()._metadata
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    other = untraceable(chain)
    for value in other.parameters():
        value.data.mul_(1.5)
    for assign in (False, True):
        target = copy.deepcopy(fused)
        target.load_state_dict(other.state_dict(), strict=True, assign=assign)
        assert_same(target, other, image())
        whole = nn.Sequential(copy.deepcopy(fused))
        whole.load_state_dict(nn.Sequential(other).state_dict(), strict=True, assign=assign)
        assert_same(whole, other, image())
    plain.load_state_dict(target.state_dict())
    assert_same(plain, other, image())


def test_unfuse_gives_the_very_modules_back() -> None:
    network = untraceable(chain)
    before = dict(network.named_modules())
    types = {name: type(module) for name, module in before.items()}
    attributes = {name: set(vars(module)) for name, module in before.items()}
    fused = observed(network, inplace=True)
    assert fused is network
    assert fused_cna.fuse(fused, example_inputs=image(), inplace=True) is network
    assert parts_of(fused)["conv2"] == "conv + norm + relu"
    fused_cna.unfuse(fused, inplace=True)
    assert dict(network.named_modules()) == before
    assert {name: type(module) for name, module in network.named_modules()} == types
    assert {name: set(vars(module)) for name, module in network.named_modules()} == attributes


def test_observing_leaves_no_trace() -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        net.count.add_(1)
        net.running = net.running + 1
        net.kept = x
        x.add_(torch.rand(()) + random.random())
        return chain(net, x)

    plain = untraceable(between)
    plain.calls, plain.running = 0, torch.zeros(())
    plain.register_buffer("count", torch.zeros((), dtype=torch.long))
    x = image()
    state = (torch.get_rng_state(), random.getstate())
    fused = observed(plain, x, inplace=True)
    assert parts_of(fused)["conv1"] == "conv + norm + relu"
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert torch.equal(x, image())
    assert (fused.calls, fused.running, fused.count, fused.kept) == (0, 0, 0, None)


def test_network_that_does_not_run_on_its_inputs() -> None:
    plain = untraceable(chain)
    with pytest.raises(FusionError, match=r"Untraceable does not run on example_inputs.*channels"):
        observed(plain, image(2, 1, 5, 8, 8), inplace=True)
    assert type(plain.conv1) is nn.Conv2d
    assert NAME not in plain.__dict__
    assert "forward" not in plain.conv1.__dict__


def test_strict_says_what_is_missing() -> None:
    plain = untraceable(lambda net, x: net.bn1(y := net.conv1(x)) + y)
    with pytest.raises(FusionError, match=r"conv1: its result goes to 2 places: bn1 .*, add"):
        observed(plain, strict=True)


def test_parts_that_can_be_traced_keep_their_overlays() -> None:
    torch.manual_seed(0)
    plain = untraceable(lambda net, x: chain(net, x) * net.tail(net.tail.head(x)))
    plain.tail = nn.Sequential()
    plain.tail.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1))
    plain.tail.after = nn.BatchNorm2d(6)
    plain.between = lambda net, x: chain(net, x).mean() * net.relu(net.tail.after(net.tail.head(x)))
    randomized(plain)
    fused = observed(plain)
    assert parts_of(fused)["tail.head.0"] == "conv + norm"
    assert sum(layer.fused for layer in layers_of(fused).values()) >= 3
    assert_same(fused, plain, image())
    assert_same(fused_cna.unfuse(fused), plain, image())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_detectors(name: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    options = {} if "320" in name else {"min_size": 96, "max_size": 128}
    plain = randomized(getattr(detection, name)(weights=None, weights_backbone=None, **options))
    images = [image(5, 3, 96, 128).abs(), image(6, 3, 80, 128).abs()]
    fused = observed(plain, (images,))
    assert list(fused.state_dict()) == list(plain.state_dict())
    layers = layers_of(fused).values()
    norms = sum(isinstance(m, nn.BatchNorm2d) or "FrozenBatch" in type(m).__name__ for m in plain.modules())
    assert sum("norm" in layer.parts for layer in layers) == norms > 40
    assert all(layer.fused or layer.reason for layer in layers)
    # The boxes depend on which of almost equal scores comes first.
    heads: list[list[Tensor]] = []
    for network in (plain, fused):
        network.backbone.register_forward_hook(lambda module, args, maps: heads.append(list(maps.values())))
        with torch.no_grad():
            network([x.clone() for x in images])
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-9, atol=1e-9)
