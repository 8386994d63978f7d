"""``report``: what it says of fused, plain and partly fused networks, as data and as a text."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_cna import ConvNormAct, FusionError, FusionReport, fuse, report
from fused_cna.fusion.records import LayerRecord, records_of
from tests.verified_networks import InPython, Network, image

PARTS = {
    "stem": "pad + conv + norm + silu",
    "first.conv1": "conv + norm + relu",
    "first.gate": "conv + sigmoid",
    "first.conv2": "conv + norm + add + relu",
    "second.conv1": "conv + norm + relu",
    "second.gate": "conv + sigmoid",
    "second.conv2": "conv + norm + add + relu",
    "head": "conv",
}


def parts_of(result: FusionReport) -> dict[str, str]:
    return {layer.name: layer.parts for layer in result.layers}


@pytest.mark.parametrize("kind", ["plain", "fused", "frozen", "compiled"])
@pytest.mark.parametrize("inputs", [None, image()], ids=["as it is", "for a call"])
def test_the_layers_and_totals(kind: str, inputs: Tensor | None) -> None:
    network = Network().eval()
    asked = network if kind == "plain" else fuse(network, freeze=kind == "frozen")
    result = report(torch.compile(asked) if kind == "compiled" else asked, inputs)
    assert (result.network, result.is_fused, result.is_frozen) == (
        "Network",
        kind != "plain",
        kind == "frozen",
    )
    assert parts_of(result) == PARTS
    assert [layer.name for layer in result.left_alone] == ["head"]
    assert len(result.fused) == 7
    assert (result.norms_fused, result.additions_fused) == (5, 2)
    assert not any(layer.looks_fusible for layer in result.layers)
    assert result.as_written == ()
    assert "7 of 8 convolutions" in str(result).partition("\n")[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_in_training_mode_stays_as_it_is(fused: bool) -> None:
    network = (fuse(Network().eval()) if fused else Network()).train()
    before = copy.deepcopy(network.state_dict())
    for inputs in (None, image()):
        result = report(network, inputs)
        assert result.is_training
        assert parts_of(result) == PARTS
        assert "training mode" in str(result)
    assert all(module.training for module in network.modules())
    assert any("fused" in name for name in vars(network)) == fused
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_within_another() -> None:
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), fuse(Network().eval()), nn.Flatten()).eval()
    outer.append(nn.Sequential(ConvNormAct(3, 3, act=nn.SiLU)))
    result = report(outer)
    assert result.is_fused
    inner = {f"1.{name}": parts for name, parts in PARTS.items()}
    assert parts_of(result) == {"0": "conv", **inner, "3.0.conv": "conv + norm + silu"}
    assert result.layers[0].reason == "it is outside of what was fused"
    assert parts_of(report(fuse(Network().eval()).first)).keys() == {"conv1", "gate", "conv2"}


def test_python_code_is_named_with_the_reason() -> None:
    result = report(InPython().eval())
    (path,) = result.untraceable
    assert path == ""
    layers = {layer.name: layer for layer in result.layers}
    assert layers.keys() == PARTS.keys()
    assert {name for name, layer in layers.items() if layer.fused} == {n for n in PARTS if "." in n}
    assert layers["stem"].looks_fusible
    text = " ".join(str(result).split())
    assert result.untraceable[path] in text
    assert 'backend="fused_cna"' in text


def scale(module: nn.Module, args: object, y: Tensor) -> Tensor:
    return 2 * y


def test_hooks_and_parametrizations_are_named() -> None:
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in "123"))
    network.append(nn.Conv2d(3, 3, 1))
    for i in range(3):  # of a convolution, a norm, and an activation
        network[i][i].register_forward_hook(scale)
    nn.utils.parametrizations.weight_norm(network[3])
    result = report(network.eval())
    *hooked, parametrized = result.layers
    assert all(f"forward hook {__name__}.scale" in layer.reason for layer in hooked)
    assert f"forward hook {__name__}.scale" in " ".join(str(result).split())
    assert [layer.parts for layer in hooked] == ["conv", "conv", "conv + norm"]
    assert "weight by _WeightNorm" in parametrized.reason
    for module, named in ((network, True), (network[3], False)):
        assert ('backend="fused_cna"' in str(report(module))) == named, "it cannot fuse a computed weight"


def test_what_changed_runs_as_it_was_written() -> None:
    fused = fuse(Network().eval())
    fused.first.register_forward_hook(lambda module, args, y: None)
    assert not report(fused).fused
    result = report(fused, image())
    assert result.as_written == ("Network",)
    assert {layer.name for layer in result.fused} == {name for name in PARTS if "." in name}
    assert "Call fuse() again" in str(result)
    copied = copy.deepcopy(fuse(Network().eval()))
    assert parts_of(report(copied)) == PARTS, "a copy is traced by its first call, or by the report"
    assert parts_of(report(copied, image())) == PARTS


def test_weights_that_are_repacked() -> None:
    kinds: list[tuple[int, dict[str, int]]] = [(3, {}), (3, {"groups": 2}), (1, {}), (3, {"groups": 8})]
    blocks = [nn.Sequential(nn.Conv2d(8, 8, size, **options), nn.ReLU()) for size, options in kinds]
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    network = nn.Sequential(stem, *blocks, nn.Conv2d(8, 8, 3)).eval()
    for asked in (network, fuse(network)):
        result = report(asked)
        assert result.repacked == ("1.0", "2.0")
        assert "torch.channels_last" in str(result)
        asked = copy.deepcopy(asked).to(memory_format=torch.channels_last)
        assert report(asked, torch.randn(1, 3, 16, 16)).repacked == ()
    assert report(fuse(network, freeze=True)).repacked == ()


def traced(module: nn.Module, *made: Any) -> nn.Module:
    """As if so many signatures had been traced; a text is why one was not."""
    vars(module)["fused_cna_overlay"] = SimpleNamespace(made=dict(enumerate(made)), frozen=False)
    return module


def trace(*layers: LayerRecord, holds: bool = True, **leaves: nn.Module) -> Any:
    return SimpleNamespace(layers=[*layers], leaves=leaves, holds=lambda network: holds)


def test_layers_of_several_traces() -> None:
    called = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "block": ConvNormAct(1, 1)})
    network = nn.ModuleDict(
        {name: nn.Conv2d(1, 1, 1) for name in ("conv", "other", "idle")} | {"called": called}
    )
    other = LayerRecord("other", "conv", "why")
    first = trace(LayerRecord("conv", "conv", "why"), LayerRecord("conv", "conv + relu"), other)
    second = trace(LayerRecord("conv", "conv + norm"), called=traced(called, "a reason"))
    changed = trace(LayerRecord("other", "conv + relu"), holds=False)
    layers, untraceable = records_of(traced(network, first, second, changed, "another reason").eval())
    assert [(layer.name, layer.parts, layer.reason.partition(" ")[0]) for layer in layers] == [
        ("conv", "conv + norm", ""),
        ("conv", "conv + relu", ""),
        ("other", "conv", "why"),
        ("called.conv", "conv", "Python"),
        ("called.block.conv", "conv + norm + relu", ""),
        ("idle", "conv", "it"),
    ]
    assert untraceable == {"called": "a reason"}


def test_the_text_fits_a_screen() -> None:
    names = [f"stages.{i}.{j}.conv{k}" for i in range(6) for j in range(20) for k in range(3)]
    layers = [LayerRecord(name, "conv + norm + relu") for name in names]
    layers += [
        LayerRecord("long." * 5 + c, "conv", f"it goes to {ord(c)} places: {c}", True) for c in "abcdefg"
    ]
    result = FusionReport("Made", True, tuple(layers), {"x": "reason " * 40}, ("y",), tuple(names))
    lines = str(result).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100
    text = " ".join(str(result).split())
    assert "360 conv + norm + relu: stages.*.*.conv*" in text
    assert "7 conv (it goes to several places), 7 look fusible: long" in text
    assert ", and 3 more" in text


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"report\(\) takes an nn\.Module, but got the class Network"):
        report(Network)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_inputs must be a tensor"):
        report(Network(), "image")
    with pytest.raises(FusionError, match="Network fails on"):
        report(Network().eval(), image()[:, :2])
    with torch.device("meta"), pytest.raises(FusionError, match="meta device"):
        report(Network())
    assert "no convolution" in str(report(nn.Linear(2, 2)))
