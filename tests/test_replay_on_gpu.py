"""CUDA graphs of whole networks on a GPU: what test_replay.py shows with graphs that are pretended."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

import fused_cna
from fused_cna.fusion.compiler import compile_graph
from tests.compiled_networks import Block, randomised
from tests.conftest import needs_gpu
from tests.reference import relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    torch.manual_seed(0)
    # What is launched instead of replayed warns.
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("error", message=".*fused with cuda_graphs=True")
        yield


def network(name: str = "resnet18", dtype: torch.dtype = torch.float16) -> Any:
    with torch.inference_mode(False):
        built = randomised(pytest.importorskip("torchvision").models.get_model(name, weights=None))
        return built.to("cuda", dtype, memory_format=torch.channels_last)


def images(n: int = 1, size: int = 64, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(n, 3, size, size, device="cuda", dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )


def pair(*options: Any) -> tuple[Any, Any]:
    """A network that replays, and the same that is launched."""
    plain = network(*options)
    with torch.inference_mode(False):
        return fused_cna.fuse(plain, cuda_graphs=True), fused_cna.fuse(plain)


def check(replayed: Any, launched: Any, *inputs: Tensor) -> Tensor:
    actual, expected = replayed(*inputs), launched(*inputs)
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    assert relative_error(actual, expected.double()) <= 2e-3
    return actual


def number_captured(fused: Any) -> int:
    return sum(line.endswith(": replayed") for line in fused_cna.report(fused).cuda_graphs or ())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_replay_answers_as_launched_kernels(name: str, dtype: torch.dtype) -> None:
    replayed, launched = pair(name, dtype)
    inputs = [images(1, 64, dtype), images(1, 64, dtype) * 2, images(2, 96, dtype)]
    kept = [check(replayed, launched, x) for x in inputs * 2]
    for y, x in zip(kept, inputs * 2, strict=True):
        assert relative_error(y, launched(x).double()) <= 2e-3
    assert number_captured(replayed) == 2


def test_changes_are_seen() -> None:
    replayed, launched = pair()
    x = images()
    check(replayed, launched, x)
    for change in (
        lambda net: net.fc.weight.mul_(2),
        lambda net: net.bn1.running_var.mul_(4),
        lambda net: setattr(net.conv1.weight, "data", net.conv1.weight.data * 3),
        lambda net: net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()}, assign=True),
        lambda net: setattr(net.relu, "forward", lambda x: x),
    ):
        with torch.inference_mode(False), torch.no_grad():
            for one in (replayed, launched):
                change(one)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(replayed, launched, x)
            check(replayed, launched, x * 2)


def test_autocast_keeps_no_cast_of_a_weight() -> None:
    replayed, launched = pair("resnet18", torch.float32)
    x = images(dtype=torch.float32)
    for _ in range(3):
        with torch.autocast("cuda", torch.float16):
            check(replayed, launched, x)
        check(replayed, launched, x)
        for one in (replayed, launched):
            one.fc.weight.data.mul_(2)
    assert number_captured(replayed) == 2


def test_streams() -> None:
    replayed, launched = pair()
    inputs = [images() for _ in range(8)]
    expected = [launched(x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for index, x in enumerate(inputs):
        with torch.cuda.stream(streams[index % 3]):
            results.append(replayed(x))
    torch.cuda.synchronize()
    for y, one in zip(results, expected, strict=True):
        assert relative_error(y, one.double()) <= 2e-3


def test_many_replays_hold_no_more_memory_than_few() -> None:
    replayed, _ = pair()
    x = images()
    held = []
    for count in (3, 100):
        for _ in range(count):
            replayed(x)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1]


def test_within_another_capture() -> None:
    replayed, launched = pair()
    x = images()
    check(replayed, launched, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = replayed(x)
    x.mul_(2)
    graph.replay()
    assert relative_error(y, launched(x).double()) <= 2e-3


class Waits(nn.Module):
    """Calls an operator that waits for the GPU, which only a capture finds out."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fused_cna_test.waits(self.block(x))


def test_a_capture_that_fails_leaves_everything_usable() -> None:
    library = torch.library.Library("fused_cna_test", "FRAGMENT")
    library.define("waits(Tensor x) -> Tensor")
    library.impl("waits", lambda x: x + float(x.sum() > 0), "CompositeExplicitAutograd")
    with torch.inference_mode(False):
        plain = randomised(Waits()).cuda().half()
        fused = fused_cna.fuse(plain, cuda_graphs=True)
    x = torch.randn(1, 8, 9, 9, device="cuda", dtype=torch.float16)
    with pytest.warns(UserWarning, match="its capture failed"):
        check(fused, plain, x)
    check(fused, plain, x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").isfinite().all()
    other, launched = pair()
    check(other, launched, images())
    assert number_captured(other) == 1


def test_copies_and_moves() -> None:
    replayed, launched = pair()
    check(replayed, launched, images())
    with torch.inference_mode(False):
        made = copy.deepcopy(replayed)
        replayed.fc.weight.data.zero_()
    check(made, launched, images())
    check(made.float(), launched.float(), images(dtype=torch.float32))
    assert number_captured(made) == 1


@pytest.mark.parametrize(
    "options", [{"options": {"inner": "cudagraphs"}}, {"mode": "reduce-overhead"}], ids=str
)
def test_graphs_of_the_compile_backend(options: dict[str, Any], fresh_dynamo: None) -> None:
    if "mode" in options and not has_triton():
        pytest.skip("inductor needs triton")
    plain = network()
    compiled = torch.compile(plain, backend=compile_graph, **options)
    with torch.inference_mode(False), torch.no_grad():
        for n in (1, 1, 2, 3, 2):
            torch.compiler.cudagraph_mark_step_begin()
            x = images(n)
            assert relative_error(compiled(x).clone(), plain(x).double()) <= 5e-3
            plain.fc.weight.mul_(1.5)
