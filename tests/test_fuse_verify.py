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
from fused_cna.fusion.verify import verify_fused
from tests.verified_networks import InPython, Network, image, network


class At:
    """A layer of a fused network, for a test to spoil."""

    def __init__(self, fused: Any, layer: str) -> None:
        (self.overlay,) = fused.fused_cna_overlay.made.values()
        self.node = self.call(layer)
        self.block = dict(self.overlay.graph.named_modules()).get(self.node.target)

    def call(self, layer: str) -> fx.Node:
        modules = dict(self.overlay.graph.named_modules())
        nodes = self.overlay.graph.graph.nodes
        return next(n for n in nodes if getattr(modules.get(n.target), "group_name", n.name) == layer)

    def set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self.block, name, value)

    def result(self, change: Callable[[Tensor], Any]) -> None:
        right = self.block.forward
        self.set(forward=lambda *args: change(right(*args)))


def other_eps(at: At) -> None:
    norm = copy.deepcopy(at.block.norm)
    norm.eps = 1e-4
    at.set(norm=norm)


def swapped_weights(at: At) -> None:
    conv = copy.deepcopy(at.block.conv)
    conv.weight.data = conv.weight.data.flip(0)
    at.set(conv=conv)


def with_one(value: float) -> Callable[[At], None]:
    return lambda at: at.result(lambda y: y.index_put((torch.tensor(1),) * 4, y.new_tensor(value)))


FAULTS: dict[str, tuple[str, Callable[[At], Any]]] = {
    "no norm": ("first.conv1", lambda at: at.set(norm=nn.Identity())),
    "no activation": ("stem", lambda at: at.set(act=nn.Identity())),
    "other activation": ("second.conv1", lambda at: at.set(act=nn.LeakyReLU(0.2))),
    "no padding": ("stem", lambda at: at.set(zero_pad=(1, 0, 1, 0))),
    "other order": ("second.conv2", lambda at: at.set(residual_order="act_add")),
    "no residual": ("first.conv2", lambda at: setattr(at.node, "args", at.node.args[:1])),
    "other residual": ("second.conv2", lambda at: at.node.update_arg(1, at.call("stem"))),
    "other input": ("second.conv1", lambda at: at.node.update_arg(0, at.call("stem"))),
    "other shape": ("second.conv2", lambda at: at.result(lambda y: y[:, :, 1:])),
    "other function": ("mean_2", lambda at: setattr(at.node, "target", "amax")),
    "other eps": ("first.conv2", other_eps),
    "swapped weights": ("first.conv2", swapped_weights),
    "a NaN": ("second.conv1", with_one(float("nan"))),
    "an infinity": ("first.conv1", with_one(float("inf"))),
}


def spoilt(patch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], plain: nn.Module, **options: Any) -> str:
    """What ``fuse`` says of a network that is spoilt between making and verifying."""

    def verify(fused: nn.Module, inputs: tuple[Any, ...]) -> None:
        verify_fused(fused, inputs)
        spoil(fused)
        verify_fused(fused, inputs)

    patch.setattr("fused_cna.fusion.fuse.verify_fused", verify)
    example = image(next(plain.parameters()).dtype)
    # Of an image that is NaN on both sides nothing is known, and the other one is compared.
    example[1] = float("nan") if plain.training else example[1]
    with pytest.raises(FusionError) as raised:
        fuse(plain, example_inputs=example, inplace=True, **options)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_layer_is_named(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "other eps" and dtype == torch.bfloat16:
        pytest.skip("it makes less of a difference than rounding")
    (layer, spoil), plain = FAULTS[fault], network(dtype=dtype).train(fault == "no norm")
    message = spoilt(monkeypatch, lambda fused: spoil(At(fused, layer)), plain)
    assert re.findall(r"first difference: ([\w.]+)", message) == [layer]
    assert set(re.findall(r"\w+\.conv\d", message)) <= {layer, "second.conv2"}
    assert type(plain) is Network, "a network that is refused is left as it was"
    assert plain.training == (fault == "no norm")


def test_layers_of_parts_and_of_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    message = spoilt(monkeypatch, lambda fused: At(fused.first, "gate").set(act=nn.ReLU()), network(InPython))
    assert "difference: first.gate: " in message
    frozen = spoilt(
        monkeypatch, lambda net: At(net, "first.gate").block.bias.add_(0.1), network(), freeze=True
    )
    assert "difference: first.gate: " in frozen
    error, allowed = map(float, re.findall(r"[\d.]+e-\d+|\d\.\d+", frozen))
    assert 1e-8 < allowed < 1e-5 < 1e-3 < error < 1


def test_what_fails_is_told_from_an_original_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    message = spoilt(monkeypatch, lambda fused: At(fused, "second.conv1").result(lambda y: y[9]), network())
    assert "where the original runs: " in message
    with pytest.raises(FusionError, match="Network fails on example_inputs"):
        fuse(network(), example_inputs=image()[:, :2])


class Pair(Network):
    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        return {"places": y.argmax(1), "values": (y, y * 2)}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("output['values'][1]", lambda given: given | {"values": given["values"][:1]}),
        ("output['values'][0]", lambda given: given | {"values": given["values"][::-1]}),
        ("output['places']", lambda given: given | {"places": given["values"][0]}),
    ],
)
def test_results_are_compared_too(part: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(fused: Any) -> None:
        node = At(fused, "output").node
        node.args = (change(dict(node.args[0])),)

    assert part in spoilt(monkeypatch, spoil, network(Pair))


class Detector(InPython):
    """Numbers, and places that change with the last bit, in an object."""

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.features(x)).flatten(1)
        scores, places = (1 + y * 3e-7).topk(20)
        return SimpleNamespace(
            boxes=[scores, places], best={"label": places[0, 0].item(), "score": float(y.amax())}
        )


class Random(Network):
    def forward(self, x: Tensor) -> Any:
        return super().forward(F.dropout(x, 0.2, True)) * (1 + torch.rand(()))


class RandomPython(InPython):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x * random.random())


class Cancelling(Network):
    """Rounding errors grow to a thousandth."""

    def forward(self, x: Tensor) -> Any:
        return super().forward((self.features(x)[:, :3] + 1e4) - 1e4)


class OnlyFloat32(Network):
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


KINDS = (Network, InPython, Pair, Detector, Random, RandomPython, Cancelling, OnlyFloat32, Stateful)
RIGHT: dict[str, tuple[type[Network], Callable[[Tensor], Tensor]]] = {
    **{kind.__name__: (kind, lambda x: x) for kind in KINDS},
    "large": (Network, lambda x: x * 1e4),
    "overflow": (Network, lambda x: x * torch.finfo(x.dtype).max / 8),
    "NaN": (Network, lambda x: x.index_fill(0, torch.tensor(1), float("nan"))),
}


@pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore:torch.fx cannot follow")
def test_right_networks_pass(name: str, dtype: torch.dtype, freeze: bool) -> None:
    if (name == "OnlyFloat32" and dtype != torch.float32) or (name in ("overflow", "NaN") and freeze):
        pytest.skip("the original does not run, or oneDNN's ReLU makes numbers of NaN")
    kind, change = RIGHT[name]
    fused = network(kind, dtype)
    before, own, random_state = copy.deepcopy(fused.state_dict()), dict(vars(fused)), torch.get_rng_state()
    fuse(fused, example_inputs=change(image(dtype)), freeze=freeze, inplace=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: value for name, value in vars(fused).items() if name in own} == own
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


def test_it_runs_where_there_are_inputs_and_takes_about_three_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[torch.dtype] = Counter()
    right = nn.Conv2d._conv_forward

    def counted(conv: Any, x: Tensor, *args: Any) -> Tensor:
        runs[x.dtype] += 1
        return right(conv, x, *args)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    fuse(network(), example_inputs=image())
    assert runs[torch.float64] == 8
    assert 8 <= runs[torch.float32] <= 16
    fuse(network(), example_inputs=image(), verify=False)
    assert (runs[torch.float64], runs.total() <= 32) == (8, True)
