"""Networks that ask in which mode they run, which may be another one in the next call."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.jit import is_tracing as traces
from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

import fused_cna
from tests.fusion_cases import Group, assert_same, every_freeze, randomise
from tests.zoo.fused_calls import recorded

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0))


class Block(Group):
    """Computes something else where the answer is yes."""

    ask: Callable[[], Any]

    def helper(self) -> Any:
        return self.ask()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 100 if self.helper() else y


def network(ask: Callable[[], Any]) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(Group(), type("Asking", (Block,), {"ask": staticmethod(ask)})(), Group())
    randomise(made)
    return made.eval()


@contextlib.contextmanager
def changed(set_to: Callable[[Any], object], there: Any, back: Any) -> Iterator[None]:
    set_to(there)
    try:
        yield
    finally:
        set_to(back)


def within(context: Callable[[], Any]) -> Callable[[nn.Module], Tensor]:
    def run(module: nn.Module) -> Tensor:
        with context():
            return module(X)

    return run


def compiled(module: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager")(X)


with_gradients, in_inference_mode = within(torch.enable_grad), within(torch.inference_mode)
detecting_anomalies = within(lambda: torch.autograd.set_detect_anomaly(True))
in_float16 = within(lambda: torch.autocast("cpu", torch.float16))
in_autocast = within(lambda: torch.autocast("cpu", torch.bfloat16))
in_float64 = within(lambda: changed(torch.set_default_dtype, torch.float64, torch.float32))
deterministic = within(lambda: changed(torch.use_deterministic_algorithms, True, False))
exporting_to_onnx = within(lambda: changed(lambda on: setattr(GLOBALS, "in_onnx_export", on), True, False))


def traced(module: nn.Module) -> Tensor:
    return torch.jit.trace(module, X, check_trace=False)(X)


def exported(module: nn.Module) -> Tensor:
    return torch.export.export(module, (X,)).module()(X)


def followed(module: nn.Module) -> Tensor:
    return torch.fx.symbolic_trace(module)(X)


# What is asked, with the names that people have for it, and the mode in which the answer is yes.
MODES: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], Tensor]]] = {
    "jit.is_tracing": (lambda: torch.jit.is_tracing(), traced),
    "is_tracing, aliased": (lambda: traces(), traced),
    "_C._get_tracing_state": (lambda: torch._C._get_tracing_state() is not None, traced),
    "is_fx_tracing": (lambda: torch.fx._symbolic_trace.is_fx_tracing(), followed),
    "is_exporting": (lambda: torch.compiler.is_exporting(), exported),
    "is_compiling": (lambda: torch.compiler.is_compiling(), compiled),
    "is_compiling, exported": (lambda: torch.compiler.is_compiling(), exported),
    "is_dynamo_compiling": (lambda: torch.compiler.is_dynamo_compiling(), compiled),
    "is_in_onnx_export": (lambda: torch.onnx.is_in_onnx_export(), exporting_to_onnx),
    "is_autocast_enabled": (lambda: torch.is_autocast_enabled("cpu"), in_autocast),
    "is_autocast_cpu_enabled": (lambda: torch.is_autocast_cpu_enabled(), in_autocast),
    "get_autocast_cpu_dtype": (lambda: torch.get_autocast_cpu_dtype() is torch.float16, in_float16),
    "get_autocast_dtype": (lambda: torch.get_autocast_dtype("cpu") == torch.float16, in_float16),
    "get_default_dtype": (lambda: torch.get_default_dtype() is torch.float64, in_float64),
    "default dtype of a constant": (lambda: torch.tensor(1.0).dtype is torch.float64, in_float64),
    "are_deterministic": (lambda: torch.are_deterministic_algorithms_enabled(), deterministic),
    "deterministic debug mode": (lambda: torch.get_deterministic_debug_mode() > 0, deterministic),
    "is_grad_enabled": (lambda: torch.is_grad_enabled(), with_gradients),
    "is_grad_enabled by getattr": (lambda: getattr(torch, "is_grad_" + "enabled")(), with_gradients),
    "is_inference_mode_enabled": (lambda: torch.is_inference_mode_enabled(), in_inference_mode),
    "inference of a new tensor": (lambda: torch.ones(1).is_inference(), in_inference_mode),
    "is_anomaly_enabled": (lambda: torch.is_anomaly_enabled(), detecting_anomalies),
}


def outside(module: nn.Module) -> Tensor:
    return module(X)


def check(way: Callable[[nn.Module], Tensor], fused: nn.Module, plain: nn.Module) -> None:
    assert_same(way(fused), way(plain), 0.05 if way in (in_autocast, in_float16) else 1e-5)


@pytest.mark.parametrize("first", ["outside", "inside"])
@pytest.mark.parametrize(("ask", "mode"), MODES.values(), ids=MODES)
def test_the_answer_is_that_of_the_call(
    ask: Callable[[], Any], mode: Callable[[nn.Module], Tensor], first: str
) -> None:
    """Whichever comes first, the mode or a call outside of it."""
    plain, fused = network(ask), fused_cna.fuse(network(ask))
    with torch.no_grad():
        sizes = [float(way(plain).float().abs().mean()) for way in (outside, mode)]
        assert sizes[1] > 3 * sizes[0], "the network does not see the mode"
        for way in (outside, mode, outside) if first == "outside" else (mode, outside, mode):
            check(way, fused, plain)
        with recorded(fused) as calls:
            outside(fused)
    assert {call.conv for call in calls if call.norm} >= {"0.conv", "2.conv"}


NAMES = {mode: name for name, (_, mode) in MODES.items()}


@every_freeze
@pytest.mark.parametrize("mode", NAMES, ids=NAMES.values())
def test_who_does_not_ask_is_right_in_every_mode(mode: Callable[[nn.Module], Tensor], freeze: bool) -> None:
    plain = network(lambda: False)
    fused = fused_cna.fuse(plain, example_inputs=X, freeze=freeze)
    with torch.no_grad():
        for way in (mode, outside, mode):
            check(way, fused, plain)


def test_what_the_garbage_collector_calls_is_not_of_the_network() -> None:
    def collected(phase: str, info: object) -> None:
        try:
            assert info is not None
        except AssertionError:
            raise

    threshold = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1, 1, 1)
    try:
        assert fused_cna.report(fused_cna.fuse(Group().eval())).fused
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(collected)
