"""Graphs of FrozenConv: memory that is written to again, and batches that run in parts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fused_cna import ConvNormAct
from fused_cna.fusion import frozen
from fused_cna.fusion.cpu_memory import multiply_into, reuse_memory
from fused_cna.fusion.frozen import FrozenConv
from tests.reference import assert_close_in_any_order

needs_onednn = pytest.mark.skipif(
    torch.float32 not in frozen._ONEDNN_DTYPES, reason="needs a torch with oneDNN"
)


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FrozenConv) or super().is_leaf_module(m, module_qualified_name)


class Graph(nn.Module):
    """Three layers and a pool, put together by a function."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("a", "b", "c"):
            block = ConvNormAct(8, 8, act=nn.SiLU if name == "a" else None).eval()
            setattr(self, name, FrozenConv.from_block(block))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def trace(run: Callable[..., Tensor]) -> fx.GraphModule:
    model = Graph(run).eval()
    return fx.GraphModule(model, Leaves().trace(model))


def image(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def residual_block(m: Graph, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(m.b(y), y)


def squeeze_and_excite(m: Graph, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(m.b(m.pool(y)).sigmoid() * y)


def both(m: Graph, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.b(y, y * 1)
    return m.c(z) * z.mean((2, 3), keepdim=True)


OVERWRITING = {"residual": (residual_block, 1), "scale": (squeeze_and_excite, 1)}

KEEPING: dict[str, Callable[..., Tensor]] = {
    "residual read later": lambda m, x: m.b(m.a(x), (y := m.c(x))) + y,
    "residual is the input of the network": lambda m, x: m.b(m.a(x), x),
    "residual is the input of the layer": lambda m, x: m.b(y := m.a(x), y),
    "residual returned too": lambda m, x: torch.cat([y := m.a(x), m.b(x, y)], 1),
    "residual viewed": lambda m, x: (v := (y := m.a(x)).flatten(1)) + m.b(x, y).flatten(1) + v,
    "residual that is a view": lambda m, x: m.b(x, m.a(x)[:]),
    "module used twice": lambda m, x: m.b(x, y := m.b(x, m.a(x))) + y,
    "scaled tensor read later": lambda m, x: (y := m.a(x)) * m.pool(y) + y,
    "squared": lambda m, x: (y := m.a(x)) * y,
}


@needs_onednn
@pytest.mark.parametrize(("run", "count"), OVERWRITING.values(), ids=OVERWRITING)
def test_overwrites(run: Callable[..., Tensor], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = trace(run), image(2, 8, 9, 7)
    expected, given = graph(x), x.clone()
    assert reuse_memory(graph) == count
    made: list[int] = []
    graph.a.register_forward_hook(lambda _, __, y: made.append(y.data_ptr()))
    overwritten: list[int] = []
    in_place = frozen._convolution_add_

    def recorded(residual: Tensor, *rest: object) -> Tensor:
        overwritten.append(residual.data_ptr())
        return in_place(residual, *rest)

    monkeypatch.setattr(frozen, "_convolution_add_", recorded)
    assert_close_in_any_order(graph(x), expected)
    assert torch.equal(x, given)
    if run is residual_block:
        assert overwritten == made


@pytest.mark.parametrize("run", KEEPING.values(), ids=KEEPING)
def test_keeps_what_is_read_later(run: Callable[..., Tensor]) -> None:
    graph, x = trace(run), image(2, 8, 9, 7)
    expected, given = graph(x), x.clone()
    reuse_memory(graph)
    assert_close_in_any_order(graph(x), expected)
    assert_close_in_any_order(graph(x), expected)
    assert torch.equal(x, given)


@pytest.mark.parametrize("run", [residual_block, squeeze_and_excite, both])
def test_overwriting_graphs_trace_copy_and_differentiate(run: Callable[..., Tensor]) -> None:
    graph, x = trace(run), image(2, 8, 9, 7)
    expected = graph(x)
    reuse_memory(graph)
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    for twin in (compiled, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph.a))):
        if isinstance(twin, FrozenConv):
            continue
        assert_close_in_any_order(twin(x), expected)
    assert_close_in_any_order(torch.export.export(graph, (x,)).module()(x), expected)
    with torch.enable_grad():
        x.requires_grad_()
        y = graph(x)
        y.square().sum().backward()
    assert_close_in_any_order(y, expected)


def test_multiplies_elsewhere_where_it_does_not_fit() -> None:
    small, large = image(2, 8, 1, 1), image(2, 8, 4, 4)
    expected = small * large
    assert multiply_into(small, large).shape == (2, 8, 4, 4)
    assert multiply_into(large, small).data_ptr() == large.data_ptr()
    torch.testing.assert_close(large, expected)
    assert multiply_into(large.half(), small).dtype == torch.float32
