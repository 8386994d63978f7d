"""``report``: what it says of fused, plain and partly fused networks, as data and as a text."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import ConvNormAct, FusionError, FusionReport, fuse, report
from fused_cna.fusion import report_text
from fused_cna.fusion.reporting import LayerReport, PlannedCall
from tests.test_fuse_verify import Network, image


class Shared(nn.Module):
    """A convolution used twice, and one that nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = torch.relu(norm(self.first(x)))
        return self.last(x)


class InPython(nn.Module):
    """A network that FX cannot follow around one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Network()
        self.outer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 1e9 else self.inner(self.outer(x))


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


@pytest.mark.parametrize("fused_before", [False, True])
def test_the_layers_and_totals(fused_before: bool) -> None:
    network = Network().eval()
    result = report(fuse(network) if fused_before else network)
    assert isinstance(result, FusionReport)
    assert (result.network, result.is_fused) == ("Network", fused_before)
    assert {layer.name: layer.parts for layer in result.layers} == PARTS
    assert [layer.name for layer in result.left_alone] == ["head"]
    assert len(result.fused) == 7
    assert result.by_parts["conv + norm + add + relu"] == 2
    assert (result.norms_fused, result.additions_fused) == (5, 2)
    assert result.reasons == {"nothing that could be fused follows": 1}
    assert not any(layer.looks_fusible or layer.calls for layer in result.layers)
    assert result.planned_for is None


def test_a_plain_network_stays_as_it_is() -> None:
    network = Network()
    before = copy.deepcopy(network.state_dict())
    text = str(report(network, image()))
    assert type(network) is Network
    assert network.training
    assert not [name for name in vars(network) if "fused" in name]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert text.startswith("Network, which is not fused: fuse() would fuse 7 of 8 convolutions\n")


def test_a_fused_network_stays_as_it_is() -> None:
    fused = fuse(Network().eval())
    fused.bn.train()
    overlay = vars(fused)["fused_cna_overlay"]
    report(fused, image(), device="A100")
    assert vars(fused)["fused_cna_overlay"] is overlay
    assert fused.bn.training
    assert not fused.training


def test_reasons_are_grouped() -> None:
    result = report(Shared().eval())
    reason = "its weight is used more than once, with different things after it"
    assert result.reasons == {reason: 2, "nothing that could be fused follows": 1}
    assert [layer.looks_fusible for layer in result.layers] == [True, True, False]
    text = str(result)
    assert f"    2  {reason} (2 look fusible)\n         first (2 times)\n" in text
    assert "         last (its result goes to the output)\n" in text


def test_python_code_is_named_with_the_reason() -> None:
    result = report(InPython().eval())
    assert set(result.untraceable) == {""}
    assert "control flow" in result.untraceable[""]
    assert {layer.name.removeprefix("inner."): layer.parts for layer in result.layers} == {
        **PARTS,
        "outer": "conv",
    }
    assert "  the network itself: its control flow depends on the input" in str(result)


def test_fused_networks_within_a_plain_one() -> None:
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), fuse(Network().eval()), nn.Flatten()).eval()
    outer.append(nn.Sequential(ConvNormAct(3, 3, act=nn.SiLU)))
    result = report(outer)
    assert result.is_fused
    assert {layer.name: layer.parts for layer in result.layers} == {
        "0": "conv",
        **{f"1.{name}": parts for name, parts in PARTS.items()},
        "3.0.conv": "conv + norm + silu",
    }
    assert result.layers[0].reason == "it is outside of what was fused"


def test_a_part_of_a_fused_network() -> None:
    with pytest.warns(UserWarning, match="cannot follow all of InPython"):
        fused = fuse(InPython().eval())
    result = report(fused.inner)
    assert result.is_fused
    assert {layer.name: layer.parts for layer in result.layers} == PARTS


def test_a_compiled_network_is_reported_as_what_was_compiled() -> None:
    network = Network().eval()
    assert report(torch.compile(network)) == report(network)


def test_nothing_to_fuse() -> None:
    result = report(nn.Linear(2, 2))
    assert result.layers == ()
    assert str(result) == "Linear: there is no convolution (nn.Conv2d) in it, so there is nothing to fuse"
    assert json.loads(json.dumps(result.as_dict()))["totals"]["convolutions"] == 0


def test_training_mode_is_said() -> None:
    training, evaluated = (str(report(fuse_quietly(network))) for network in (Network(), Network().eval()))
    assert "It is in training mode, in which a fused network runs as it was written, live" in training
    assert "training mode" not in evaluated


def fuse_quietly(network: nn.Module) -> nn.Module:
    training = network.training
    return fuse(network.eval()).train(training)


def test_a_fused_network_that_no_longer_runs_so_is_told() -> None:
    fused = fuse(Network().eval())
    assert report(fused).as_written == ()
    fused.first.register_forward_hook(lambda module, args, y: None)
    result = report(fused)
    assert result.as_written == ("Network",)
    assert "so this runs as it was\nwritten: Network. Call fuse() again." in str(result)


def test_a_frozen_network() -> None:
    fused = fuse(Network().eval(), freeze=True)
    result = report(fused, image())
    assert result.is_frozen
    assert {layer.name: layer.parts for layer in result.layers} == PARTS
    # A snapshot also takes the place of a convolution that nothing follows.
    assert all(layer.calls for layer in result.layers)
    assert str(result).startswith("Network, frozen: 7 of 8 convolutions are fused\n")
    assert "On a CPU, blocks are calls of oneDNN." in str(result)
    assert not report(fuse(Network().eval())).is_frozen


@pytest.mark.parametrize("fused_before", [False, True])
def test_plans_for_the_shapes_of_one_run(fused_before: bool) -> None:
    network: nn.Module = Network().eval().to(torch.float16).to(memory_format=torch.channels_last)
    inputs = image(torch.float16).to(memory_format=torch.channels_last)
    result = report(fuse(network) if fused_before else network, inputs, device="A100")
    assert result.planned_for == "A100"
    layers = {layer.name: layer for layer in result.layers}
    assert layers["head"].calls == ()
    assert layers["head"].kernel == ""
    (call,) = layers["stem"].calls
    assert (call.x_shape, call.y_shape, call.device) == ((2, 3, 16, 16), (2, 8, 8, 8), "A100")
    expected = fused_cna.explain(
        fused_cna.ConvProblem(
            *(2, 3, 16, 16, 8, 3, 3), stride=2, padding=(0, 1, 0, 1), norm=True, act="silu"
        ),
        device="A100",
    )
    assert (call.kernel, call.plan) == (expected.kernel, expected.candidates[0]["name"])
    assert call.microseconds == expected.estimate_us
    assert not call.is_tuned
    assert call.why.startswith("bound by ")
    assert layers["first.conv2"].calls[0].convolution.endswith("norm + residual + relu")
    assert layers["first.conv1"].calls == layers["second.conv1"].calls
    text = str(result)
    assert "kernel on A100" in text
    assert (
        f"  2 x {layers['first.conv1'].calls[0].microseconds:7.1f} us estimated: 3x3, 8 to 8 channels" in text
    )
    assert "Convolutions without a kernel are torch's own." in text


def test_a_layer_that_is_called_with_several_sizes_has_a_plan_for_each() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x)[..., ::2, ::2])

    result = report(Pyramid().eval(), image())
    assert [[call.x_shape[2] for call in layer.calls] for layer in result.layers] == [[16, 8]] * 2
    assert result.planned_for == "H100"


def test_as_data() -> None:
    data = json.loads(json.dumps(report(Network().eval(), image()).as_dict()))
    assert data["network"] == "Network"
    assert data["totals"]["fused"] == 7
    assert data["totals"]["by_parts"]["conv + sigmoid"] == 2
    stem = data["layers"][0]
    assert (stem["name"], stem["fused"]) == ("stem", True)
    assert stem["calls"][0]["y_shape"] == [2, 8, 8, 8]
    assert stem["kernel"] == stem["calls"][0]["kernel"]


def made_up(layers: list[LayerReport]) -> FusionReport:
    return FusionReport("Made", True, tuple(layers))


def test_a_large_network_fits_a_screen() -> None:
    names = [
        f"stages.{stage}.{block}.conv{i}" for stage in range(6) for block in range(20) for i in range(1, 4)
    ]
    text = str(made_up([LayerReport(name, "conv + norm + relu") for name in names]))
    assert "  stages.5.*.conv*     60  conv + norm + relu" in text
    assert len(text.splitlines()) < 20
    flat = [LayerReport(f"features.{index}.block.conv", "conv + norm + relu") for index in range(300)]
    assert "  features.*.block.conv    300  conv + norm + relu" in str(made_up(flat))


def test_lines_are_limited() -> None:
    deep = ".".join(["a_module_with_a_long_name"] * 6)
    plan = PlannedCall("c " * 70, (1,), (1,), "H100", "kernel", "k " * 40, 1.0, True, "why " * 30)
    layers = [
        LayerReport(f"{deep}.{name}", "conv", f"a reason: {'a detail, ' * 30}", True, (plan,))
        for name in "abcdefgh"
    ]
    text = str(FusionReport("Made", True, tuple(layers), {"x": "reason " * 40}, planned_for="H100"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 200
    assert sum(len(line) > 100 for line in lines) <= 4, "only names that cannot be broken"
    assert "  a_module_with_a_lon...with_a_long_name.a  " in text
    assert ", and 4 more" in " ".join(text.split())
    assert "8 x     1.0 us measured" in text


def test_the_reason_without_what_is_said_of_one_layer() -> None:
    kinds = {report_text.kind_of_reason(f"its result goes to {n} places: a, b") for n in (2, 12)}
    assert kinds == {"its result goes to several places"}


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"report\(\) takes an nn\.Module, but got the class Network"):
        report(Network)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_inputs must be a tensor"):
        report(Network(), "image")
    with pytest.raises(ValueError, match="device='A100' is what to plan for, which needs example_inputs"):
        report(Network(), device="A100")
    with pytest.raises(ValueError, match="Z9000"):
        report(Network().eval(), image(), device="Z9000")
    with pytest.raises(FusionError, match="Network fails on the example inputs"):
        report(Network().eval(), image()[:, :2])
    with torch.device("meta"), pytest.raises(FusionError, match="meta device"):
        report(Network())
