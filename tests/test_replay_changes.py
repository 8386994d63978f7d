"""A network that replays CUDA graphs is an object that its owner changes: no replay may be of what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import _tuned
from fused_cna.fusion.records import OVERLAYS
from tests.fake_graphs import FakeGpu, gpu
from tests.fusion_cases import CASES, Group, assert_same
from tests.test_fuse_changes import CHANGES, Changeable, image
from tests.test_fuse_lifecycle import STEPS, UNFUSED
from tests.test_replay import TOLERANCE, check, pair

__all__ = ["gpu"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:Changeable, fused with")
def test_a_change_is_seen(change: str, gpu: FakeGpu) -> None:
    fused, plain = pair(Changeable)
    check(fused, plain)
    before = check(fused, plain)
    assert gpu.replays == [2]
    results = []
    for network in (plain, fused):
        torch.manual_seed(3)
        with torch.no_grad():
            CHANGES[change](network)
            results += [network(image()), network(image())]
    assert_same(results[2:], results[:2], 1e-9)
    assert_same(before, check(*pair(Changeable)), TOLERANCE)


@pytest.mark.parametrize("do", STEPS)
def test_a_step_is_seen(do: str, gpu: FakeGpu) -> None:
    """And what comes of it has graphs again, of its own."""
    case = CASES["bottlenecks"]
    fused, plain = fused_cna.fuse(case.build(), cuda_graphs=True), case.build()
    check(fused, plain)
    after, expected = (STEPS[do](network) or network for network in (fused, plain))
    with torch.no_grad():
        assert_same(after(image()), expected(image()), 1e-5 if "float32" in do else 1e-8)
        done = sum(gpu.replays)
        after(image())
    assert sum(gpu.replays) == done + (do not in UNFUSED)
    check(fused, fused_cna.unfuse(fused))


# What people do to a network that a replay would not notice by itself.
HIDDEN: dict[str, Callable[[Any], object]] = {
    "hook": lambda net: net.conv.register_forward_hook(lambda module, args, y: y + 1),
    "hook before": lambda net: net.act.register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
    "hook of the network": lambda net: net.register_forward_hook(lambda module, args, y: y * 2),
    "slope": lambda net: setattr(net.act, "negative_slope", 0.7),
    "dilation": lambda net: (setattr(net.conv, "dilation", (2, 2)), setattr(net.conv, "padding", (2, 2))),
    "training": lambda net: net.norm.train(),
    "all in training": lambda net: net.train(),
    "another layout": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.transpose(2, 3)),
    "another module": lambda net: setattr(net, "norm", nn.BatchNorm2d(4).double().eval()),
    "a scalar": lambda net: setattr(net, "scale", nn.Parameter(torch.ones(1).double())),
    "assigned": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True),
    "cast and back": lambda net: net.conv.half().double(),
}


class Scaled(Group):
    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.LeakyReLU(0.3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("change", HIDDEN)
@pytest.mark.filterwarnings("ignore:Scaled, fused with")
def test_a_hidden_change_is_seen(change: str, gpu: FakeGpu) -> None:
    fused, plain = pair(Scaled)
    for network in (fused, plain):
        check(network, plain)
        HIDDEN[change](network)
        with torch.no_grad():
            network.scale.mul_(3)
    check(fused, plain)
    with torch.no_grad():
        fused.scale.mul_(3), plain.scale.mul_(3)
    check(fused, plain)


def test_a_mode_that_passes_ends_nothing(gpu: FakeGpu) -> None:
    fused, plain = pair()
    handle = fused.act.register_forward_hook(lambda module, args, y: y)
    with pytest.warns(UserWarning, match="a ReLU of it has the forward hook"):
        check(fused, plain)
    handle.remove()
    check(fused, plain)
    assert gpu.replays == [1]


def test_what_changes_all_the_time_is_launched_in_the_end(gpu: FakeGpu) -> None:
    fused, plain = pair()
    for _ in range(20):
        check(fused, plain)

    def exchanged() -> None:
        for network in (fused, plain):
            network.conv.weight = nn.Parameter(network.conv.weight.detach() * 1.1)
        check(fused, plain)

    for _ in range(8):
        exchanged()
    with pytest.warns(UserWarning, match="exchanged after every few calls"):
        exchanged()
    assert gpu.replays == [20] + [1] * 8


def test_tuned_plans_are_taken(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair()
    check(fused, plain)
    monkeypatch.setattr(_tuned, "_revision", -1)
    check(fused, plain)
    assert gpu.replays == [1, 1]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_capture_anew(copied: Callable[[nn.Module], nn.Module], gpu: FakeGpu) -> None:
    fused, plain = pair()
    check(fused, plain)
    made = copied(fused)
    with torch.no_grad():
        fused.conv.weight.zero_()
    check(made, plain)
    assert gpu.replays == [1, 1]
    assert vars(made)[OVERLAYS].replays is not vars(fused)[OVERLAYS].replays
