"""Graphs of FrozenConv: how results lie in memory, and memory that is written to again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_cna import ConvNormAct
from fused_cna.fusion import frozen
from fused_cna.fusion.frozen import FrozenConv, keep_layout, reuse_memory
from tests.reference import assert_close_in_any_order

Run = Callable[[Any, Tensor], Any]


class Layers(nn.Module):
    """Three layers and more, put together by a function."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("a", "b", "c"):
            setattr(self, name, ConvNormAct(8, 8, act=nn.SiLU if name == "a" else None))
        self.norm, self.pool, self.up = (
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Upsample(scale_factor=2),
        )
        self.linear = nn.Linear(8, 8)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ConvNormAct) or super().is_leaf_module(m, module_qualified_name)


def trace(plain: nn.Module) -> fx.GraphModule:
    graph = fx.GraphModule(plain, Tracer().trace(plain))
    for name in "abc":
        if hasattr(graph, name):
            setattr(graph, name, FrozenConv(getattr(graph, name)))
    return graph


def image(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def nhwc(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


LAYOUTS: dict[str, Run] = {
    "results": lambda m, x: [y := m.a(x), {"b": m.b(y), "again": y}],
    "elementwise": lambda m, x: F.relu(m.norm(m.up(m.b(m.a(x)) * 2 + 1) * 3)),
    "residual": lambda m, x: m.c(m.b(x), x),
    "squeeze and excite": lambda m, x: m.b((y := m.a(x)).mean((2, 3), keepdim=True)).sigmoid() * y,
    "scale by a view": lambda m, x: (y := m.a(x)) * m.linear(m.pool(y).flatten(1)).view(-1, 8, 1, 1),
    "views": lambda m, x: [
        (y := m.a(x)).view(y.shape[0], 2, 4, 9, 7),
        m.b(x).flatten(2),
        m.c(x).transpose(1, 3),
    ],
    "slices": lambda m, x: [
        torch.chunk(m.a(x), 2, 1)[1],
        (p := m.b(x).split(4, 1))[0],
        p[1] + 1,
        m.c(x)[:, 2:],
    ],
    "a linear layer on pixels": lambda m, x: m.b(m.linear(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "concatenation": lambda m, x: [torch.cat([y := m.a(x), m.b(y)], 1), torch.cat([nhwc(y), y], 1)],
    "what depends on strides": lambda m, x: [m.a(x).as_strided((2, 3), (5, 1)), m.b(x).contiguous() + 0],
    "overwritten": lambda m, x: [y := m.a(x), F.relu(y, inplace=True), y.flatten(1).mul_(2), y.add_(1)],
    "overwritten view": lambda m, x: [
        v := F.relu(y := m.a(x), inplace=True).flatten(1),
        v.mul_(2),
        y,
        m.b(y),
    ],
}


@pytest.mark.parametrize("run", LAYOUTS.values(), ids=LAYOUTS)
def test_results_lie_as_those_of_the_plain_network(run: Run) -> None:
    for weights, images in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        plain = Layers(run).eval().to(memory_format=weights)
        graph, x = trace(plain), image(2, 8, 9, 7).to(memory_format=images)
        keep_layout(graph)
        reuse_memory(graph)
        expected, got = plain(x.clone()), graph(x.clone())
        assert_close_in_any_order(got, expected)
        strides = torch.utils._pytree.tree_map(lambda y: y.stride(), (got, expected))
        assert strides[0] == strides[1]


def residual_block(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(m.b(y), y)


KEEPING: dict[str, Run] = {
    "residual read later": lambda m, x: m.b(m.a(x), (y := m.c(x))) + y,
    "residual is the input of the network": lambda m, x: m.b(m.a(x), x),
    "residual is the input of the layer": lambda m, x: m.b(y := m.a(x), y),
    "residual returned too": lambda m, x: torch.cat([y := m.a(x), m.b(x, y)], 1),
    "residual viewed": lambda m, x: (v := (y := m.a(x)).flatten(1)) + m.b(x, y).flatten(1) + v,
    "residual that is a view": lambda m, x: m.b(x, m.a(x)[:]),
    "module used twice": lambda m, x: m.b(x, y := m.b(x, m.a(x))) + y,
}


@pytest.mark.skipif(not frozen._onednn_dtypes, reason="needs a torch with oneDNN")
def test_overwrites_what_nothing_reads_later(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = trace(Layers(residual_block).eval()), image(2, 8, 9, 7)
    expected, given = graph(x), x.clone()
    reuse_memory(graph)
    made: list[int] = []
    graph.a.register_forward_hook(lambda _, __, y: made.append(y.data_ptr()))
    overwritten: list[int] = []

    def recorded(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *rest: overwritten.append(x.data_ptr()) or operator(x, *rest)  # type: ignore[func-returns-value]

    monkeypatch.setattr(frozen, "_convolution_add_", recorded(frozen._convolution_add_))
    assert_close_in_any_order(graph(x), expected)
    assert torch.equal(x, given)
    assert overwritten == made


@pytest.mark.parametrize("run", KEEPING.values(), ids=KEEPING)
def test_keeps_what_is_read_later(run: Run) -> None:
    graph, x = trace(Layers(run).eval()), image(2, 8, 9, 7)
    expected, given = graph(x), x.clone()
    reuse_memory(graph)
    for _ in range(2):
        assert_close_in_any_order(graph(x), expected)
    assert torch.equal(x, given)


@pytest.mark.parametrize("run", [residual_block, LAYOUTS["squeeze and excite"], LAYOUTS["views"]])
def test_graphs_trace_and_differentiate(run: Run) -> None:
    graph, x = trace(Layers(run).eval()), image(2, 8, 9, 7)
    expected = graph(x)
    keep_layout(graph)
    reuse_memory(graph)
    assert_close_in_any_order(torch.compile(graph, backend="aot_eager", fullgraph=True)(x), expected)
    assert_close_in_any_order(torch.export.export(graph, (x,)).module()(x), expected)
    with torch.enable_grad():
        assert_close_in_any_order(graph(x.requires_grad_()), expected)
