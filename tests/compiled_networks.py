"""Networks for ``torch.compile(model, backend="fused_cna")``, and the graphs that it makes of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_cna import functional, ops
from fused_cna.fusion import compiler
from tests.reference import relative_error

TOLERANCE = 2e-6


class Graphs:
    """The backend, eager inside, that remembers the graphs it was given, each with its fused calls."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner = inner
        self.made: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.made.append(graph_module)
        return compiler.compile_graph(graph_module, inputs, options={"inner": self.inner})

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The arguments of all calls of the operator, in order."""
        names = list(inspect.signature(functional.conv_norm_act).parameters)[:-1]
        nodes = [node for graph_module in self.made for node in graph_module.graph.nodes]
        return [dict(zip(names, node.args, strict=True)) for node in nodes if node.target is ops.operator]

    @property
    def parts(self) -> list[str]:
        """What each of them computes besides the convolution."""
        return [" + ".join(_parts(call)) for call in self.calls]


def _parts(call: dict[str, Any]) -> Iterator[str]:
    if call["running_mean"] is not None:
        yield "norm"
    if call["residual"] is not None:
        yield call["residual_order"]
    if call["act"] != "identity":
        yield call["act"]


def randomised(network: nn.Module) -> nn.Module:
    """The network in eval mode, with batch norms that do something."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.uniform_(-0.3, 0.3)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return network.eval()


class Block(nn.Module):
    """Two convolutions, the second with a residual, which only some uses add."""

    def __init__(self, channels: int = 6, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.act(y)


BLOCK = ["norm + relu", "norm + add_act + relu"]


class FunctionalNorm(nn.Module):
    """``F.batch_norm`` of whatever it is given."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("mean", torch.rand(conv.out_channels, dtype=dtype))
        self.register_buffer("var", torch.rand(conv.out_channels, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 6, 9, 10))


def check(
    network: Callable[..., Any],
    graphs: Callable[..., Any],
    *inputs: Tensor,
    compiled: Callable[..., Any] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """Compile unless that is done, run without gradients, compare with the network; the compiled one."""
    if compiled is None:
        compiled = torch.compile(network, backend=graphs, **options)
    mine, theirs = ([x.clone() for x in inputs] for _ in range(2))
    with torch.no_grad():
        actual, expected = compiled(*mine), network(*theirs)
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    assert relative_error(actual, expected.double()) <= TOLERANCE
    assert all(map(torch.equal, mine, theirs))
    return compiled


def captured(network: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo makes of a network."""
    graphs: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(copy.deepcopy(graph_module))
        for mine, theirs in zip(graphs[0].graph.nodes, graph_module.graph.nodes, strict=True):
            mine.meta = dict(theirs.meta)
        return graph_module

    with torch.no_grad():
        torch.compile(network, backend=backend, fullgraph=True)(*inputs)
    (graph_module,) = graphs
    return graph_module
