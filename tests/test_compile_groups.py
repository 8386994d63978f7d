"""What ``torch.compile(model, backend="fused_cna")`` fuses, and what it leaves alone."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiled_networks import (
    BLOCK,
    TOLERANCE,
    Block,
    FunctionalNorm,
    Graphs,
    check,
    image,
    randomised,
)
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (nn.ReLU(), "relu"),
    "relu_inplace": (nn.ReLU(inplace=True), "relu"),
    "relu_function": (torch.relu, "relu"),
    "relu_method": (lambda x: x.relu_(), "relu"),
    "relu_clamp": (lambda x: x.clamp(min=0), "relu"),
    "relu6": (nn.ReLU6(), "relu6"),
    "hardtanh": (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    "leaky_relu": (nn.LeakyReLU(0.2, inplace=True), "leaky_relu"),
    "elu": (nn.ELU(0.5), "elu"),
    "silu": (nn.SiLU(inplace=True), "silu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu_tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "hardswish": (nn.Hardswish(inplace=True), "hardswish"),
    "hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "tanh": (nn.Tanh(), "tanh"),
    "mish": (nn.Mish(), "mish"),
}


@pytest.mark.parametrize(("act", "name"), ACTS.values(), ids=ACTS)
def test_activations(act: Callable[[Tensor], Tensor], name: str, graphs: Graphs) -> None:
    check(randomised(Block(act=act)), graphs, image(), fullgraph=True)
    assert graphs.parts == [f"norm + {name}", f"norm + add_act + {name}"]


@pytest.mark.parametrize("padding", ["same", "valid", 2, (0, 1)])
def test_paddings(padding: Any, graphs: Graphs) -> None:
    check(FunctionalNorm(nn.Conv2d(6, 8, 4, padding=padding, dilation=2, groups=2)).eval(), graphs, image())
    assert graphs.parts == ["norm"]


class PadBefore(FunctionalNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 2, 3)))


def test_zeros_around_the_input(graphs: Graphs) -> None:
    check(PadBefore(nn.Conv2d(6, 8, 3, padding=(1, 2))).eval(), graphs, image(), fullgraph=True)
    (call,) = graphs.calls
    assert call["padding"] == (3, 4, 2, 3)
    (graph_module,) = graphs.made
    assert not any(node.target is torch._C._nn.pad for node in graph_module.graph.nodes)


class Crop(FunctionalNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (-1, 1, 0, 0)))


@pytest.mark.parametrize(
    "network", [Crop(nn.Conv2d(6, 8, 3, padding=1)), PadBefore(nn.Conv2d(6, 8, 3, padding="same"))]
)
def test_pads_that_stay_outside(network: nn.Module, graphs: Graphs) -> None:
    check(network.eval(), graphs, image(), fullgraph=True)
    (call,) = graphs.calls
    assert call["padding"] in ((1, 1), "same")


def test_a_residual_after_the_activation(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.silu(self.norm1(self.conv1(x)))

    check(randomised(Network()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + act_add + silu"]


class BroadcastResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


class PromotedResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)) + x.double())


class InputOverwritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv1(x)
        x.mul_(3)
        return F.relu(self.norm1(y) + x)


@pytest.mark.parametrize("kind", [BroadcastResidual, PromotedResidual, InputOverwritten])
def test_residuals_that_stay_outside(kind: type[nn.Module], graphs: Graphs) -> None:
    check(randomised(kind()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm"]


def test_views_of_one_tensor_as_inputs(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor, y: Tensor, residual: Tensor) -> Tensor:
            z = self.norm1(self.conv1(x))
            y.mul_(2)
            return F.relu(z + residual)

    network = randomised(Network())
    x, residual = image(), image()
    with torch.no_grad():
        expected = network(x.clone(), image(), residual)
        actual = torch.compile(network, backend=graphs)(x, x.view(-1), residual)
    assert relative_error(actual, expected.double()) <= TOLERANCE


def test_inputs_and_buffers_are_overwritten_as_before(graphs: Graphs) -> None:
    class Network(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = super().forward(x)
            x.add_(1)
            return y + self.calls

    network = randomised(Network())
    compiled = torch.compile(copy.deepcopy(network), backend=graphs)
    with torch.no_grad():
        for _ in range(3):
            x = image()
            expected_x, actual_x = x.clone(), x.clone()
            expected, actual = network(expected_x), compiled(actual_x)
            assert relative_error(actual, expected.double()) <= TOLERANCE
            assert torch.equal(actual_x, expected_x)
    assert graphs.parts == BLOCK


class WrittenOut(nn.Module):
    """A frozen batch norm as torchvision and timm write it, and variants that are none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)
        self.eps = 1e-3
        for name, value in (("weight", 0.5), ("bias", -0.5), ("mean", -0.3), ("var", 0.5)):
            self.register_buffer(name, torch.rand(8, dtype=dtype) + value)

    def vectors(self) -> list[Tensor]:
        return [one.reshape(1, -1, 1, 1) for one in (self.weight, self.bias, self.mean, self.var)]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        return F.relu(self.conv(x) * scale + (bias - mean * scale))


class OtherScale(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale, other = weight * (var + self.eps).rsqrt(), bias * (var + self.eps).rsqrt()
        return F.relu(self.conv(x) * scale + (bias - mean * other))


class VectorOverwritten(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        self.weight.mul_(1)
        return F.relu(self.conv(x) * scale + (bias - mean * scale))


class UsedTwice(WrittenOut):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = self.vectors()
        scale = weight * (var + self.eps).rsqrt()
        y = self.conv(x)
        return F.relu(y * scale + (bias - mean * scale)) + y


@pytest.mark.parametrize("options", [{}, {"dynamic": True}])
def test_a_norm_that_is_written_out(options: dict[str, Any], graphs: Graphs) -> None:
    check(WrittenOut().eval(), graphs, image(), **options)
    assert graphs.parts == ["norm + relu"]
    (graph_module,) = graphs.made
    assert not any(node.target in ("reshape", "rsqrt", operator.mul) for node in graph_module.graph.nodes)


@pytest.mark.parametrize(
    "network", [OtherScale(), VectorOverwritten(), UsedTwice(), WrittenOut(torch.float64)], ids=repr
)
def test_what_looks_like_a_norm_that_is_written_out(network: nn.Module, graphs: Graphs) -> None:
    check(network.eval(), graphs, image())
    assert graphs.parts == []


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_frozen_norms(name: str, graphs: Graphs) -> None:
    library = pytest.importorskip(name)
    norm = library.ops.FrozenBatchNorm2d if name == "torchvision" else library.layers.FrozenBatchNormAct2d
    network = nn.Sequential(nn.Conv2d(6, 8, 3), norm(8), nn.ReLU()).eval()
    network[1].running_var.uniform_(0.5, 2)
    network[1].running_mean.uniform_(-0.3, 0.3)
    check(network, graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu"]
