"""Graphs fused under ``torch.compile``: training, gradients, autocast, dtypes, open sizes, devices."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_cna import _extension, ops
from fused_cna.fusion import compiler
from tests.compiled_networks import (
    BLOCK,
    TOLERANCE,
    Block,
    FunctionalNorm,
    Graphs,
    captured,
    check,
    image,
    randomised,
)
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_parameters_are_read_when_it_runs(graphs: Graphs) -> None:
    network = randomised(Block())
    compiled = check(network, graphs, image())
    x = image()
    with torch.no_grad():
        network.norm1.running_mean.add_(1)
        network.conv2.weight.data.mul_(2)
        network.load_state_dict({key: value + 0.1 for key, value in network.state_dict().items()})
        assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 1


def test_training_mode_is_left_alone() -> None:
    graphs = Graphs("aot_eager")
    network = randomised(Block()).train()
    other = copy.deepcopy(network)
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    x = image()
    for run in (compiled, other):
        run(x).square().sum().backward()
    assert graphs.parts == []
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_in_eval_mode() -> None:
    graphs = Graphs("aot_eager")
    network = randomised(Block())
    other = copy.deepcopy(network)
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    x = image().requires_grad_()
    y = x.detach().clone().requires_grad_()
    compiled(x).square().sum().backward()
    other(y).square().sum().backward()
    assert graphs.parts == []
    torch.testing.assert_close(x.grad, y.grad)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_frozen_part_of_a_network_that_is_trained() -> None:
    graphs = Graphs("aot_eager")
    network = nn.Sequential(randomised(Block()), nn.Conv2d(6, 4, 1), nn.ReLU())
    network[0].requires_grad_(False)
    other = copy.deepcopy(network)
    x = image()
    torch.compile(network, backend=graphs)(x).sum().backward()
    other(x).sum().backward()
    assert graphs.parts == BLOCK
    torch.testing.assert_close(network[1].weight.grad, other[1].weight.grad)


def test_a_change_of_mode_within_a_group(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            with torch.enable_grad():
                y = self.norm1(y)
            with torch.autocast("cpu", torch.bfloat16):
                z = self.conv2(y)
            return F.relu(self.norm2(z.float()) + x), self.norm2(z)

    network = randomised(Network())
    with torch.no_grad():
        x = image()
        expected, actual = network(x), torch.compile(network, backend=graphs)(x)
    assert graphs.parts == []
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.requires_grad == theirs.requires_grad
        assert relative_error(mine, theirs.double()) <= TOLERANCE


def test_autocast_within(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = F.relu(self.norm1(self.conv1(x)))
            return F.relu(self.norm2(self.conv2(y.float())))

    check(randomised(Network()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu"] * 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_around(inner: str) -> None:
    graphs = Graphs(inner)
    with torch.autocast("cpu", torch.bfloat16):
        # The residual is float32 and what it is added to bfloat16: the sum is float32.
        check(randomised(Block()), graphs, image(), fullgraph=True)
    assert graphs.parts == ["norm + relu", "norm"]


def test_norm_vectors_that_the_operator_refuses(graphs: Graphs) -> None:
    network = FunctionalNorm(nn.Conv2d(6, 8, 3), torch.float64).eval()
    graph_module = captured(network.double(), image().double())
    for node in graph_module.graph.nodes:
        if "buffers_var" in node.name:
            node.meta["example_value"] = node.meta["example_value"].float()
    (group,) = compiler.fuse_graph(graph_module).groups
    assert group.reason == "the parameters of its norm are of several dtypes"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype, graphs: Graphs) -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 3, dtype=dtype), nn.Sigmoid()).eval()
    x = torch.randn(2, 6, 9, 9, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, backend=graphs)(x), network(x))
    assert graphs.parts == ([] if dtype.is_complex else ["sigmoid"])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_memory_formats(inner: str) -> None:
    network = randomised(Block())
    x = image().to(memory_format=torch.channels_last)
    check(network, Graphs(inner), x)
    torch._dynamo.reset()
    check(network.to(memory_format=torch.channels_last), Graphs(inner), image())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_symbolic_sizes(inner: str) -> None:
    graphs = Graphs(inner)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), randomised(Block())).eval()
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for shape in ((2, 3, 20, 24), (3, 3, 20, 24), (5, 3, 31, 17), (4, 3, 22, 40)):
            x = torch.randn(shape)
            for dimension in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, dimension)
            assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 1
    assert graphs.parts == ["relu", *BLOCK]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_by_option(inner: str) -> None:
    graphs = Graphs(inner)
    network = randomised(Block(act=nn.LeakyReLU(0.2)))
    compiled = check(network, graphs, image(), fullgraph=True, dynamic=True)
    # Dynamo may start over once it knows which numbers the backend needs.
    del graphs.made[:-1]
    with torch.no_grad():
        for shape in ((3, 6, 12, 7), (2, 6, 5, 5)):
            x = torch.randn(shape)
            assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
        assert len(graphs.made) == 1
        assert graphs.parts == ["norm + leaky_relu", "norm + add_act + leaky_relu"]
        network.norm1.eps, network.act.negative_slope = 0.25, 0.5
        assert relative_error(compiled(x), network(x).double()) <= TOLERANCE
    assert len(graphs.made) == 2


def test_a_residual_whose_size_only_the_call_shows(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return F.relu(self.norm1(self.conv1(x)) + residual)

    network = randomised(Network())
    compiled = torch.compile(network, backend=graphs, dynamic=True)
    with torch.no_grad():
        for size in ((2, 6, 9, 10), (2, 6, 9, 10), (2, 1, 1, 10)):
            x, residual = image(), torch.randn(size)
            assert relative_error(compiled(x, residual), network(x, residual).double()) <= TOLERANCE


def test_graph_breaks_and_several_graphs(graphs: Graphs) -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm1(self.conv1(x)))
            torch._dynamo.graph_break()
            if y.sum() > 0:
                y = -y
            return F.relu(self.norm2(self.conv2(y)))

    check(randomised(Network()), graphs, image())
    assert graphs.parts == ["norm + relu"] * 2
    assert len(graphs.made) >= 2


def test_checkpointed_and_conditional_parts_are_left_alone() -> None:
    class Network(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            return F.relu(self.norm1(self.conv1(y)))

    graphs = Graphs("aot_eager")
    check(randomised(Network()), graphs, image())
    assert graphs.parts == ["norm + relu"]


def test_functional_transforms_are_left_alone() -> None:
    network = randomised(Block())

    def total(x: Tensor) -> Tensor:
        return network(x).square().sum()

    graphs = Graphs("aot_eager")
    x = image()
    actual = torch.compile(torch.func.grad(total), backend=graphs)(x)
    torch.testing.assert_close(actual, torch.func.grad(total)(x))
    assert graphs.parts == []


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inference_mode(inner: str) -> None:
    graphs = Graphs(inner)
    network = randomised(Block())
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    with torch.inference_mode():
        x = image()
        actual = compiled(x)
        assert actual.is_inference()
        assert relative_error(actual, network(x).double()) <= TOLERANCE
    assert graphs.parts == BLOCK


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose GPU the extension was built for."""
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    monkeypatch.setattr(ops, "device_obstacle", lambda index: "")
    monkeypatch.setattr(ops, "_device_obstacles", {})


@pytest.mark.usefixtures("pretended_gpu")
def test_on_a_gpu_the_graph_calls_the_operator() -> None:
    graph_module = captured(randomised(Block()), image())
    compiler.fuse_graph(graph_module)
    sizes = [node.meta["example_value"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(size.shape, device="cuda") for size in sizes]
        (result,) = graph_module(*inputs)
        traced = make_fx(graph_module, tracing_mode="fake")(*inputs)
    assert result.is_cuda
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_function")
    assert calls == {torch.ops.fused_cna.conv_norm_act.default: 2}
