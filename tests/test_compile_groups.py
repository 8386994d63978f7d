"""What ``torch.compile(model, backend="fused_cna")`` fuses, and what it leaves alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_cna import activation
from tests.compiled_networks import BLOCK, Block, FunctionalNorm, Graphs, check, image, randomised

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "operators")

MODULES = [
    *(nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 6, inplace=True), nn.LeakyReLU(0.2, inplace=True)),
    *(nn.ELU(1), nn.SiLU(inplace=True), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish(inplace=True)),
    *(nn.Hardsigmoid(), nn.Tanh(), nn.Mish(inplace=True)),
]
FUNCTIONS: dict[Callable[[Tensor], Tensor], str] = {
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    lambda x: x.relu_(): "relu",
    lambda x: x.clamp(min=0): "relu",
}


@pytest.mark.parametrize(
    ("act", "name"), [*((act, activation.describe(act)[0]) for act in MODULES), *FUNCTIONS.items()]
)
def test_activations(act: Callable[[Tensor], Tensor], name: str, graphs: Graphs) -> None:
    check(randomised(Block(act=act)), graphs, image(), fullgraph=True)
    assert graphs.parts == [f"norm + {name}", f"norm + add_act + {name}"]


class Padded(FunctionalNorm):
    def __init__(self, amounts: tuple[int, ...], padding: Any, size: int = 3) -> None:
        super().__init__(nn.Conv2d(6, 8, size, padding=padding, dilation=2, groups=2))
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.amounts) if self.amounts else x)


@pytest.mark.parametrize(
    ("network", "padding"),
    [
        (Padded((), 2), (2, 2)),
        (Padded((), (0, 1)), (0, 1)),
        (Padded((), "valid"), (0, 0)),
        (Padded((), "same", size=4), (3, 3, 3, 3)),
        (Padded((), "same", size=2), (1, 1, 1, 1)),
        (Padded((0, 1, 2, 3), (1, 2)), (3, 4, 2, 3)),
        # These stay outside.
        (Padded((-1, 1, 0, 0), 1), (1, 1)),
        (Padded((0, 1, 2, 3), "same"), (2, 2, 2, 2)),
    ],
)
def test_paddings_are_numbers(network: Padded, padding: tuple[int, ...], graphs: Graphs) -> None:
    check(network.eval(), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm"]
    (call,) = graphs.calls
    assert [call[name] for name in ("stride", "padding", "dilation")] == [(1, 1), padding, (2, 2)]


def overwrites_the_input(block: Block, x: Tensor) -> Tensor:
    x = x * 2
    y = block.conv1(x)
    x.mul_(3)
    return F.relu(block.norm1(y) + x)


def writes_inputs_and_buffers(block: Block, x: Tensor) -> Tensor:
    block.norm1.num_batches_tracked += 1
    y = Block.forward(block, x)
    x.add_(block.norm1.num_batches_tracked.sign())
    return y + x


RESIDUALS: dict[str, tuple[Callable[[Block, Tensor], Tensor], list[str]]] = {
    "after": (lambda block, x: x + F.silu(block.norm1(block.conv1(x))), ["norm + act_add + silu"]),
    "broadcast": (lambda block, x: F.relu(block.norm1(block.conv1(x)) + x.mean((2, 3), True)), ["norm"]),
    "promoted": (lambda block, x: F.relu(block.norm1(block.conv1(x)) + x.double()), ["norm"]),
    "overwritten": (overwrites_the_input, ["norm"]),
    "writes": (writes_inputs_and_buffers, BLOCK),
}


@pytest.mark.parametrize(("code", "parts"), RESIDUALS.values(), ids=RESIDUALS)
def test_residuals_and_writes(
    code: Callable[[Block, Tensor], Tensor], parts: list[str], graphs: Graphs
) -> None:
    network = randomised(Block())
    network.forward = partial(code, network)
    compiled = check(network, graphs, image(), fullgraph=True)
    check(network, graphs, image(), compiled=compiled)
    assert graphs.parts == parts
    assert network.norm1.num_batches_tracked == (4 if code is writes_inputs_and_buffers else 0)


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
    torch.testing.assert_close(actual, expected)


def test_a_norm_that_has_no_batch_dimension(graphs: Graphs) -> None:
    # It takes the rows for channels.
    check(FunctionalNorm(nn.Conv2d(6, 8, 3, padding=1)).eval(), graphs, image(6, 8, 10))
    assert graphs.parts == []


class WrittenOut(nn.Module):
    """A frozen batch norm as torchvision, timm and DETR write it, and variants that are none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)
        self.eps = 1e-3
        for name, value in (("weight", 0.5), ("bias", -0.5), ("mean", -0.3), ("var", 0.5)):
            self.register_buffer(name, torch.rand(8, dtype=dtype) + value)

    def forward(self, x: Tensor) -> Tensor:
        vectors = [one.reshape(1, -1, 1, 1) for one in (self.weight, self.bias, self.mean, self.var)]
        return F.relu(self.norm(self.conv(x), *vectors))

    def norm(self, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = weight * (var + self.eps).rsqrt()
        return y * scale + (bias - mean * scale)


class OtherScale(WrittenOut):
    def norm(self, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return y * (weight * (var + self.eps).rsqrt()) + (bias - mean * (bias * (var + self.eps).rsqrt()))


class VectorOverwritten(WrittenOut):
    def norm(self, y: Tensor, *vectors: Tensor) -> Tensor:
        self.weight.mul_(1)
        return super().norm(y, *vectors)


class UsedTwice(WrittenOut):
    def norm(self, y: Tensor, *vectors: Tensor) -> Tensor:
        return super().norm(y, *vectors) + y


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
