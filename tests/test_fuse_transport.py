"""Fused networks converted, exported, compiled, vectorised and moved."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.conftest import needs_gpu
from tests.fusion_cases import CASES, MODES, assert_equal_answers, assert_same, every_freeze, image
from tests.reference import DTYPES, library_bound, relative_error

TOLERANCE = 1e-10
# Two that become one graph, and one that does not.
TRACED = ["bottlenecks", "yolo_block"]
every_network = pytest.mark.parametrize("name", [*TRACED, "branch_around_traceable_parts"])
traced_network = pytest.mark.parametrize("name", TRACED)


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    plain = CASES[name].build().to(dtype)
    return fused_cna.fuse(plain, **options), plain


def check_rounding(actual: Tensor, expected: Tensor, exact: Tensor) -> None:
    """No further from the exact result than a network of the same dtype may be."""
    assert actual.dtype == expected.dtype
    assert relative_error(actual, exact) <= library_bound(expected.dtype, relative_error(expected, exact))


@every_network
@every_freeze
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converted(name: str, freeze: bool, dtype: torch.dtype) -> None:
    fused, plain = pair(name, freeze=freeze)
    with torch.no_grad():
        exact = plain(image())
        actual = fused.to(dtype)(image().to(dtype))
        check_rounding(actual, plain.to(dtype)(image().to(dtype)), exact)
    assert {value.dtype for value in fused.parameters()} == {dtype}


@every_network
@every_freeze
def test_autocast(name: str, freeze: bool) -> None:
    fused, plain = pair(name, torch.float32, freeze=freeze)
    x = image().float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = fused(x), plain(x)
        assert_same(fused(x), plain(x), 1e-4)
        check_rounding(actual, expected, plain.double()(x.double()))


@traced_network
@every_freeze
def test_on_meta(name: str, freeze: bool) -> None:
    """Shapes can be asked for without data."""
    fused, plain = pair(name, freeze=freeze)
    fused.to("meta")
    assert all(value.is_meta for value in fused.parameters())
    assert fused(image().to("meta")).shape == plain(image()).shape


@traced_network
@every_freeze
def test_export(name: str, freeze: bool) -> None:
    fused, plain = pair(name, torch.float32, freeze=freeze)
    argument = "input" if name == "bottlenecks" else "x"
    sizes = {argument: {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        exported = torch.export.export(fused, (image().float(),), dynamic_shapes=sizes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (1, 3, 5):
        x = torch.randn(batch, 4, 8, 9)
        with torch.no_grad():
            assert_same(loaded(x), plain(x), 1e-4)


@traced_network
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", ["live", "training", "frozen"])
def test_compiled_whole(name: str, state: str, mode: str) -> None:
    """And what is compiled sees changed parameters, but for a snapshot."""
    fused, plain = pair(name, torch.float32, freeze=state == "frozen")
    fused, plain = fused.train(state == "training"), plain.train(state == "training")
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x = image(seed).float()
        with MODES[mode]():
            assert_same(compiled(x), plain(x), 1e-4)
        if state != "frozen":
            with torch.no_grad():
                for value in (*fused.parameters(), *plain.parameters()):
                    value.mul_(1.2)
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), 1e-4)


def mapped(network: nn.Module) -> Tensor:
    return torch.func.vmap(network)(image()[:, None])


def scaled(network: nn.Module) -> Tensor:
    state = {key: value * 1.5 for key, value in network.state_dict().items()}
    return torch.func.functional_call(network, state, (image(),))


def forward_gradient(network: nn.Module) -> Any:
    return torch.func.jvp(network, (image(),), (image(2)[:1].expand(2, -1, -1, -1),))


def gradient(network: nn.Module) -> Any:
    x = image().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(network(x).square().sum(), (x, *network.parameters()))


def inferred(network: nn.Module) -> Any:
    with torch.inference_mode():
        result = network(image())
    return result.clone(), result.is_inference()


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "inference_mode": inferred,
    "vmap": mapped,
    "functional_call": scaled,
    "jvp": forward_gradient,
    "gradients in eval mode": gradient,
    "jit.trace": lambda network: torch.jit.trace(network, image())(image(1)),
    "fx": lambda network: torch.fx.symbolic_trace(network)(image()),
    "compile": lambda network: torch.compile(network, backend="eager")(image()),
}


@traced_network
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore")
def test_under_torchs_transformations(name: str, way: Callable[[nn.Module], Any]) -> None:
    fused, plain = pair(name)
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            expected = way(plain)
        except torch.fx.proxy.TraceError:
            pytest.skip("the network itself cannot be traced by torch.fx")
        assert_same(way(fused), expected, TOLERANCE)
    assert_equal_answers(fused, plain)


@every_network
@every_freeze
@pytest.mark.gpu
def test_moved_and_replicated(name: str, freeze: bool) -> None:
    needs_gpu()
    fused, plain = pair(name, torch.float32, freeze=freeze)
    fused = fused.cuda()
    with torch.no_grad():
        assert_same(fused(image().float().cuda()).cpu(), plain(image().float()), 1e-2)
        replicas = torch.nn.parallel.replicate(fused, [0])
        assert_same(replicas[0](image().float().cuda()).cpu(), plain(image().float()), 1e-2)
