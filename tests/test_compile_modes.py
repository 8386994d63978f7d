"""Graphs fused under ``torch.compile``: training, gradients, autocast, dtypes, open sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_cna.fusion import compiler
from tests.compiled_networks import BLOCK, Block, FunctionalNorm, Graphs, captured, check, image, randomised

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "operators")

both_inners = pytest.mark.parametrize("inner", ["eager", "aot_eager"])


@both_inners
def test_parameters_are_read_when_it_runs(inner: str) -> None:
    graphs = Graphs(inner)
    network = randomised(Block())
    compiled = check(network, graphs, image(), fullgraph=True)
    with torch.no_grad():
        network.norm1.running_mean.add_(1)
        network.conv2.weight.data.mul_(2)
        network.load_state_dict({key: value + 0.1 for key, value in network.state_dict().items()})
    check(network, graphs, image(), compiled=compiled)
    assert len(graphs.made) == 1
    assert graphs.parts == BLOCK


def frozen_part() -> nn.Module:
    network = nn.Sequential(randomised(Block()), nn.Conv2d(6, 4, 1), nn.ReLU())
    network[0].requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("network", "wants_gradient", "parts"),
    [
        (randomised(Block()).train(), False, []),
        (randomised(Block()), True, []),
        (frozen_part(), False, BLOCK),
    ],
    ids=["training", "eval", "a frozen part"],
)
def test_gradients(network: nn.Module, wants_gradient: bool, parts: list[str]) -> None:
    graphs = Graphs("aot_eager")
    networks = [network, copy.deepcopy(network)]
    x = image()
    inputs = [x.clone().requires_grad_(wants_gradient) for _ in networks]
    torch.compile(network, backend=graphs, fullgraph=True)(inputs[0]).square().sum().backward()
    networks[1](inputs[1]).square().sum().backward()
    assert graphs.parts == parts
    tensors = [
        [given.grad, *[p.grad for p in one.parameters()], *one.buffers()]
        for one, given in zip(networks, inputs, strict=True)
    ]
    for mine, theirs in zip(*tensors, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


class ChangesModeWithin(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        with torch.enable_grad():
            y = self.norm1(y)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.conv2(y)
        assert y.requires_grad
        return F.relu(self.norm2(z.float()) + x) + self.norm2(z)


class AutocastWithin(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y.float())))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
        return F.relu(self.norm1(self.conv1(y)))


class GraphBreak(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        torch._dynamo.graph_break()
        if y.sum() > 0:
            y = -y
        return F.relu(self.norm2(self.conv2(y)))


@both_inners
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (ChangesModeWithin, []),
        (AutocastWithin, ["norm + relu"] * 2),
        (GraphBreak, ["norm + relu"] * 2),
        # Its body stays as it is.
        (Checkpointed, ["norm + relu"]),
    ],
)
def test_changes_within(inner: str, kind: type[Block], parts: list[str]) -> None:
    graphs = Graphs(inner)
    check(randomised(kind()), graphs, image())
    assert graphs.parts == parts


@both_inners
@pytest.mark.parametrize(
    ("around", "parts"),
    [
        # The residual is float32 and what it is added to bfloat16: the sum is float32.
        (lambda: torch.autocast("cpu", torch.bfloat16), ["norm + relu", "norm"]),
        (torch.inference_mode, BLOCK),
    ],
    ids=["autocast", "inference"],
)
def test_modes_around(inner: str, around: Callable[[], Any], parts: list[str]) -> None:
    graphs = Graphs(inner)
    with around():
        compiled = check(randomised(Block()), graphs, image(), fullgraph=True)
        assert compiled(image()).is_inference() == torch.is_inference_mode_enabled()
    assert graphs.parts == parts


def test_functional_transforms_are_left_alone() -> None:
    network = randomised(Block())

    def total(x: Tensor) -> Tensor:
        return network(x).square().sum()

    graphs = Graphs("aot_eager")
    x = image()
    actual = torch.compile(torch.func.grad(total), backend=graphs)(x)
    torch.testing.assert_close(actual, torch.func.grad(total)(x))
    assert graphs.parts == []


def test_norm_vectors_that_the_operator_refuses() -> None:
    network = FunctionalNorm(nn.Conv2d(6, 8, 3), torch.float64).eval()
    graph_module = captured(network.double(), image().double())
    for node in graph_module.graph.nodes:
        if "buffers_var" in node.name:
            node.meta["example_value"] = node.meta["example_value"].float()
    (group,) = compiler.fuse_graph(graph_module).groups
    assert not group.is_fused


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype, graphs: Graphs) -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 3, dtype=dtype), nn.Sigmoid()).eval()
    x = torch.randn(2, 6, 9, 9, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, backend=graphs)(x), network(x))
    assert graphs.parts == ([] if dtype.is_complex else ["sigmoid"])


@both_inners
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(inner: str, of_input: torch.memory_format, of_weight: torch.memory_format) -> None:
    network = randomised(Block()).to(memory_format=of_weight)
    check(network, Graphs(inner), image().to(memory_format=of_input))


@both_inners
def test_symbolic_sizes_and_numbers(inner: str) -> None:
    graphs = Graphs(inner)
    act = nn.LeakyReLU(0.2)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), randomised(Block(act=act))).eval()
    compiled = check(network, graphs, image(2, 3, 20, 24), fullgraph=True, dynamic=True)
    # Dynamo may start over once it knows which numbers the backend needs.
    del graphs.made[:-1]
    for shape in ((3, 3, 20, 24), (5, 3, 31, 17), (4, 3, 22, 40)):
        check(network, graphs, image(*shape), compiled=compiled)
    assert len(graphs.made) == 1
    assert graphs.parts == ["relu", "norm + leaky_relu", "norm + add_act + leaky_relu"]
    network[2].norm1.eps, act.negative_slope = 0.25, 0.5
    check(network, graphs, image(2, 3, 20, 24), compiled=compiled)
    assert len(graphs.made) == 2


def test_a_residual_whose_size_only_the_call_shows(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return F.relu(self.norm1(self.conv1(x)) + residual)

    network = randomised(Network())
    compiled = torch.compile(network, backend=graphs, dynamic=True)
    for size in ((2, 6, 9, 10), (2, 6, 9, 10), (2, 1, 1, 10)):
        check(network, graphs, image(), image(*size), compiled=compiled)
