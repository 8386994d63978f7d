"""Graphs of FrozenConv: memory that is written to again, and batches that run in parts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fused_cna import ConvNormAct
from fused_cna.fusion import cpu_batches, frozen
from fused_cna.fusion.cpu_batches import InParts, images_per_part
from fused_cna.fusion.cpu_memory import multiply_into, reuse_memory
from fused_cna.fusion.frozen import FrozenConv

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
    torch.testing.assert_close(graph(x), expected)
    assert torch.equal(x, given)
    if run is residual_block:
        assert overwritten == made


@pytest.mark.parametrize("run", KEEPING.values(), ids=KEEPING)
def test_keeps_what_is_read_later(run: Callable[..., Tensor]) -> None:
    graph, x = trace(run), image(2, 8, 9, 7)
    expected, given = graph(x), x.clone()
    reuse_memory(graph)
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(graph(x), expected)
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
        torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(torch.export.export(graph, (x,)).module()(x), expected)
    with torch.enable_grad():
        x.requires_grad_()
        y = graph(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, expected)


def test_multiplies_elsewhere_where_it_does_not_fit() -> None:
    small, large = image(2, 8, 1, 1), image(2, 8, 4, 4)
    expected = small * large
    assert multiply_into(small, large).shape == (2, 8, 4, 4)
    assert multiply_into(large, small).data_ptr() == large.data_ptr()
    torch.testing.assert_close(large, expected)
    assert multiply_into(large.half(), small).dtype == torch.float32


def head(m: Graph, x: Tensor) -> Tensor:
    return m.linear(torch.flatten(m.pool(squeeze_and_excite(m, x)), 1))


MIXING: dict[str, Callable[..., Tensor]] = {
    "mean over the batch": lambda m, x: m.a(x) + m.b(x).mean(0, keepdim=True),
    "flip of the batch": lambda m, x: m.a(x).flip(0),
    "cat of batches": lambda m, x: torch.cat([m.a(x), m.b(x)]),
    "flatten of all": lambda m, x: m.a(x).flatten(),
    "another number of dimensions": lambda m, x: m.a(x) + m.b(x).mean((2, 3)),
    "softmax over the batch": lambda m, x: m.a(x).softmax(0),
}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that hold two images of 8 channels and 9 x 7 pixels."""
    monkeypatch.setattr(cpu_batches, "_BYTES_PER_THREAD", 2 * 8 * 9 * 7 * 4 // torch.get_num_threads() + 8)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("run", [residual_block, squeeze_and_excite, head])
@pytest.mark.parametrize(("images", "parts"), [(1, [1]), (2, [2]), (5, [2, 2, 1]), (8, [2, 2, 2, 2])])
def test_runs_in_parts(run: Callable[..., Tensor], images: int, parts: list[int]) -> None:
    graph, x = trace(run), image(images, 8, 9, 7)
    expected = graph(x)
    sizes: list[int] = []
    graph.a.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    module = InParts(graph)
    torch.testing.assert_close(module(x), expected)
    sizes.clear()
    torch.testing.assert_close(module(x), expected)
    assert sizes == parts


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("run", MIXING.values(), ids=MIXING)
def test_whole_where_images_may_mix(run: Callable[..., Tensor]) -> None:
    graph, x = trace(run), image(8, 8, 9, 7)
    if run is MIXING["another number of dimensions"]:
        x = image(8, 8, 8, 8)
    assert images_per_part(graph, x) == 8
    torch.testing.assert_close(InParts(graph)(x), graph(x))


@pytest.mark.usefixtures("small_parts")
def test_whole_where_a_module_is_not_known() -> None:
    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, 0)

    graph = trace(lambda m, x: m.pool(m.a(x)))
    graph.pool = Shuffle()
    assert images_per_part(fx.GraphModule(graph, graph.graph), image(8, 8, 9, 7)) == 8


@pytest.mark.usefixtures("small_parts")
def test_parts_are_seen_by_no_compiler() -> None:
    module, x = InParts(trace(head)), image(8, 8, 9, 7)
    expected = module(x)
    torch.testing.assert_close(
        torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
