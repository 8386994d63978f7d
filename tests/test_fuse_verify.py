"""``verify=True``: planted faults are found and named, and right networks of every kind pass."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_cna import FusionError, fuse
from fused_cna.fusion.overlay import Overlay
from fused_cna.fusion.verify import verify_fused
from tests.verified_networks import InPython, Network, image, network

LAYERS = ("stem", "first.conv1", "first.gate", "first.conv2", "second.conv1", "second.gate", "second.conv2")


class At:
    """A layer of a fused network, for a test to spoil."""

    def __init__(self, fused: Any, layer: str) -> None:
        (self.overlay,) = (one for one in fused.fused_cna_overlay.made.values() if isinstance(one, Overlay))
        self.block = dict(self.overlay.blocks()).get(layer)
        self.node = self.call(layer)

    def call(self, layer: str) -> fx.Node:
        modules = dict(self.overlay.graph.named_modules())
        names = {
            node: getattr(modules.get(node.target), "group_name", node.name) for node in self.overlay.pairs
        }
        return next(node for node, name in names.items() if name == layer)

    def set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self.block, name, value)

    def change(self, part: str, change: Callable[[Any], Any]) -> None:
        """The part is the network's own, so a copy takes its place."""
        made = copy.deepcopy(getattr(self.block, part))
        change(made)
        self.set(**{part: made})

    def result(self, change: Callable[[Tensor], Any]) -> None:
        right = self.block.forward
        self.set(forward=lambda *args: change(right(*args)))


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    return lambda y: y.index_put((torch.tensor(1),) * 4, torch.tensor(value, dtype=y.dtype))


def fail(y: Tensor) -> Tensor:
    raise ValueError("no kernel")


FAULTS: dict[str, tuple[str, Callable[[At], Any]]] = {
    "no norm": ("first.conv1", lambda at: at.set(norm=nn.Identity())),
    "no activation": ("stem", lambda at: at.set(act=nn.Identity())),
    "another activation": ("second.conv1", lambda at: at.set(act=nn.LeakyReLU(0.2))),
    "no padding": ("stem", lambda at: at.set(zero_pad=(1, 0, 1, 0))),
    "another order": ("second.conv2", lambda at: at.set(residual_order="act_add")),
    "no residual": ("first.conv2", lambda at: setattr(at.node, "args", at.node.args[:1])),
    "another residual": ("second.conv2", lambda at: at.node.update_arg(1, at.call("stem"))),
    "another input": ("second.conv1", lambda at: at.node.update_arg(0, at.call("stem"))),
    "weights swapped": (
        "first.conv2",
        lambda at: at.change("conv", lambda c: c.weight.data.copy_(c.weight.flip(0))),
    ),
    "another eps": ("first.conv2", lambda at: at.change("norm", lambda norm: setattr(norm, "eps", 1e-4))),
    "a NaN": ("second.conv1", lambda at: at.result(with_one(float("nan")))),
    "an infinity": ("first.conv1", lambda at: at.result(with_one(float("inf")))),
    "another shape": ("second.conv2", lambda at: at.result(lambda y: y[:, :, 1:])),
    "another function": ("mean_2", lambda at: setattr(at.node, "target", "amax")),
}


def spoilt(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], plain: nn.Module, **options: Any
) -> str:
    """What ``fuse`` says of a network that is spoilt between making and verifying."""

    def verify(fused: nn.Module, inputs: tuple[Any, ...]) -> None:
        verify_fused(fused, inputs)
        spoil(fused)
        verify_fused(fused, inputs)

    monkeypatch.setattr("fused_cna.fusion.fuse.verify_fused", verify)
    example = options.pop("example_inputs", image(next(plain.parameters()).dtype))
    with pytest.raises(FusionError) as raised:
        fuse(plain, example_inputs=example, **options)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_layer_that_differs_is_named(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, spoil = FAULTS[fault]
    if fault == "another eps" and dtype == torch.bfloat16:
        pytest.skip("it makes less of a difference than rounding")
    plain = network(dtype=dtype)
    message = spoilt(monkeypatch, lambda fused: spoil(At(fused, layer)), plain, inplace=True)
    assert re.search(r"first difference: ([\w.]+)[:,]", message)[1] == layer  # type: ignore[index]
    assert not [name for name in LAYERS if name in message and LAYERS.index(name) > LAYERS.index(layer)] or (
        layer not in LAYERS
    )
    numbers = re.findall(r"\d\.?\d*e?-?\d*(?=[,.])", message.partition("relative error")[2])
    assert type(plain) is Network, "a network that is refused is left as it was"
    assert not fault.startswith(("a NaN", "an inf")) or "NaN or infinity" in message or numbers


def test_layers_of_parts_and_of_snapshots_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = spoilt(monkeypatch, lambda fused: At(fused.first, "gate").set(act=nn.ReLU()), network(InPython))
    assert "The first difference: first.gate: " in message
    message = spoilt(
        monkeypatch, lambda fused: At(fused, "first.gate").block.bias.add_(0.1), network(), freeze=True
    )
    assert "The first difference: first.gate: " in message
    error, allowed = map(float, re.findall(r"[\d.]+e-\d+|\d\.\d+", message))
    assert 1e-8 < allowed < 1e-5 < 1e-3 < error < 1


def test_what_fails_is_told_from_an_original_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    message = spoilt(monkeypatch, lambda fused: At(fused, "second.conv1").result(fail), network())
    assert "where the original runs, after first.conv2: no kernel" in message
    with pytest.raises(FusionError, match="Network fails on example_inputs"):
        fuse(network(), example_inputs=image()[:, :2])


class Detector(Network):
    """Results that rounding may swap, in an object."""

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.features(x)).flatten(1)
        scores, places = y.topk(20)
        return SimpleNamespace(
            boxes=[scores, places], best={"label": places[0, 0].item(), "score": float(y.amax())}
        )


class Near(Detector):
    """Scores that all but tie, so that places change with the last bit."""

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.features(x)).flatten(1)
        return (1 + y * 3e-7).topk(20)[1]


class Random(Network):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.drop(super().forward(F.dropout(x, 0.2, True))) * (1 + torch.rand(()))


class RandomPython(InPython):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * random.random())


class Cancelling(Network):
    """Rounding errors grow to a thousandth."""

    def forward(self, x: Tensor) -> Any:
        return (
            super().forward(x * 1e-4 + 1)
            if self.training
            else super().features(super().features(x).mean(1, True).expand(-1, 3, -1, -1) + 1e4 - 1e4)
        )


class OnlyFloat32(Network):
    """Does not run in float64, as a whole or as a graph."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(super().forward(x), torch.ones_like(x[0, 0, :, :5], dtype=torch.float32))


class Stateful(InPython):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Any:
        self.runs += 1
        self.seen += 1
        return super().forward(x * self.seen) * self.runs


RIGHT: dict[str, tuple[type[Network], Callable[[Tensor], Tensor]]] = {
    **{
        kind.__name__: (kind, lambda x: x)
        for kind in (Network, InPython, Detector, Random, RandomPython, Stateful)
    },
    **{kind.__name__: (kind, lambda x: x) for kind in (Near, Cancelling, OnlyFloat32)},
    "large": (Network, lambda x: x * 1e4),
    "overflow": (Network, lambda x: x * torch.finfo(x.dtype).max / 8),
    "NaN": (Network, lambda x: x.index_fill(0, torch.tensor(1), float("nan"))),
}


@pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore:torch.fx cannot follow")
def test_right_networks_pass(name: str, dtype: torch.dtype, freeze: bool) -> None:
    kind, change = RIGHT[name]
    if kind is OnlyFloat32 and dtype != torch.float32:
        pytest.skip("it does not run")
    plain = network(kind, dtype)
    before, own, random_state = copy.deepcopy(plain.state_dict()), dict(vars(plain)), torch.get_rng_state()
    if kind is Random:
        plain.drop.train()
    fused = fuse(plain, example_inputs=change(image(dtype)), freeze=freeze, inplace=True)
    assert fused is plain
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: value for name, value in vars(fused).items() if name in own} == own
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


def test_results_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python code makes of the layers, and a graph of its nodes."""

    def other_places(fused: Any) -> None:
        node = At(fused, "topk").node
        node.kwargs = {**node.kwargs, "largest": False}

    def other_parts(fused: Any) -> None:
        (node,) = At(fused, "stem").overlay.graph.graph.find_nodes(op="output")
        node.args = ([node.args[0], node.args[0]],)

    assert "difference: topk" not in (message := spoilt(monkeypatch, other_places, network(Near)))
    assert "output is not what the original returns" in message
    assert "other parts" in spoilt(monkeypatch, other_parts, network())


def test_training_mode_is_verified_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = network().train()
    message = spoilt(monkeypatch, lambda fused: At(fused, "stem").set(act=nn.Identity()), plain, inplace=True)
    assert "first difference: stem" in message
    assert all(module.training for module in plain.modules())


def test_verify_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_cna.fusion.fuse.verify_fused", fail)
    fuse(network(), example_inputs=image(), verify=False)
    fuse(network(), verify=True)
    with pytest.raises(ValueError, match="no kernel"):
        fuse(network(), example_inputs=image())


def test_it_takes_about_three_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[torch.dtype] = Counter()
    right = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda conv, x, *args: (runs.update([x.dtype]), right(conv, x, *args))[1]
    )
    fuse(network(), example_inputs=image())
    assert runs[torch.float64] <= 8
    assert runs.total() <= 3 * 8
