"""Networks for ``torch.compile(model, backend="fused_cna")``, and the graphs that it makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fused_cna
from fused_cna.fusion import compiler
from tests.reference import relative_error

TOLERANCE = 2e-6


class Graphs:
    """The backend, eager inside, that remembers the graphs it was given, each with its fused calls."""

    def __init__(self, inner: str = "eager", **options: Any) -> None:
        self.options = {"inner": inner, **options}
        self.made: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.made.append(graph_module)
        return compiler.compile_graph(graph_module, inputs, options=self.options)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The options of all fused calls, in order."""
        return [
            dict(node.kwargs)
            for graph_module in self.made
            for node in graph_module.graph.nodes
            if node.target is fused_cna.conv_norm_act
        ]

    @property
    def parts(self) -> list[str]:
        """What each fused call computes besides the convolution."""
        return [
            " + ".join(
                [
                    *(["norm"] if "running_mean" in call else []),
                    *([call["residual_order"]] if "residual" in call else []),
                    *([call["act"]] if call.get("act", "identity") != "identity" else []),
                ]
            )
            for call in self.calls
        ]


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


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 6, 9, 10))


def check(
    network: Callable[..., Any], graphs: Graphs, *inputs: Tensor, tolerance: float = TOLERANCE, **options: Any
) -> Callable[..., Any]:
    """Compile, run, compare; the compiled network."""
    compiled = torch.compile(network, backend=graphs, **options)
    with torch.no_grad():
        expected = network(*[x.clone() for x in inputs])
        actual = compiled(*[x.clone() for x in inputs])
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert relative_error(actual, expected.double()) <= tolerance
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


class FunctionalNorm(nn.Module):
    """``F.batch_norm`` of whatever it is given."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("mean", torch.rand(conv.out_channels, dtype=dtype))
        self.register_buffer("var", torch.rand(conv.out_channels, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)
