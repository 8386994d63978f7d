"""`fuse(cuda_graphs=True)`: what is captured, what a replay sees, and what is launched instead."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from tests.fake_graphs import FakeGpu, Stream, gpu
from tests.fusion_cases import CASES, Group, assert_same, compare, randomise
from tests.test_fuse_changes import image

__all__ = ["gpu"]

TOLERANCE = 1e-10


def pair(network: Callable[[], nn.Module] = Group) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = network()
    randomise(plain)
    plain.double().eval()
    return fused_cna.fuse(plain, cuda_graphs=True), plain


def check(fused: Any, plain: Any, *inputs: Any) -> Any:
    """Both called with the same; what the fused one returns."""
    inputs = inputs or (image(),)
    with torch.no_grad():
        actual, expected = fused(*inputs), plain(*inputs)
    assert_same(actual, expected, TOLERANCE)
    return actual


def test_a_graph_reads_inputs_and_keeps_results(gpu: FakeGpu) -> None:
    fused, plain = pair()
    kept = [(check(fused, plain, image() * factor), factor) for factor in (1, 2, 3)]
    for y, factor in kept:
        with torch.no_grad():
            assert_same(y, plain(image() * factor), TOLERANCE)
        assert y._base is None
    check(fused_cna.unfuse(fused), plain)
    assert gpu.replays == [3]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_case(name: str, gpu: FakeGpu) -> None:
    """Results, memory and side effects as of the plain network, whether or not there is a graph."""
    case = CASES[name]
    compare(case, fused_cna.fuse(case.build(), cuda_graphs=True), case.build(), ("no_grad",))


def test_modes_need_no_graphs_of_their_own(gpu: FakeGpu) -> None:
    fused, plain = pair()
    fused.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode):
        with mode():
            y, expected = fused(image()), plain(image())
        assert_same(y, expected, TOLERANCE)
        assert y.is_inference() == (mode is torch.inference_mode)
    assert gpu.replays == [4]


def test_a_wanted_gradient_is_one(gpu: FakeGpu) -> None:
    fused, plain = pair()
    check(fused, plain)
    fused(image()).sum().backward()
    plain(image()).sum().backward()
    assert_same(fused.conv.weight.grad, plain.conv.weight.grad, TOLERANCE)
    fused.requires_grad_(False)
    x = image().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    fused(image())
    fused.norm.bias = nn.Parameter(fused.norm.bias.detach() + 1)
    assert fused(image()).requires_grad
    assert gpu.replays == [2]


def test_signatures_and_settings_have_their_own_graphs_in_one_pool(gpu: FakeGpu) -> None:
    fused, plain = pair()
    x = image()
    for _ in range(2):
        check(fused, plain, x)
        check(fused, plain, x[:1])
        check(fused, plain, x.to(memory_format=torch.channels_last))
        with torch.backends.cudnn.flags(deterministic=True):
            check(fused, plain, x)
    assert gpu.replays == [2, 2, 2, 2]
    assert len(set(gpu.pools)) == 1
    fused.to(torch.float64)
    check(fused, plain, x)
    assert len(set(gpu.pools)) == 2
    assert gpu.autocast_keeps_casts == [False] * 5


def test_a_ninth_signature_is_launched(gpu: FakeGpu) -> None:
    fused, plain = pair()
    sizes = [image()[:, :, :n] for n in range(1, 9)]
    for x in sizes:
        check(fused, plain, x)
    with pytest.warns(
        UserWarning, match="Group, fused with cuda_graphs=True, launches .* there are 8 graphs"
    ):
        check(fused, plain, image()[:1, :, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(fused, plain, image()[:1, :, :4])
        check(fused, plain, sizes[0])
    assert gpu.replays == [2, 1, 1, 1, 1, 1, 1, 1]
    assert "there are 8 graphs" in str(fused_cna.report(fused))


class Returns(Group):
    """A network that returns what a function makes of its input and its result."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x, super().forward(x))


RESULTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "dict": lambda net, x, y: {"b": y, "a": [y + 1, (y.mean(), None)], "size": 3},
    "one twice": lambda net, x, y: (y, y),
    "halves": lambda net, x, y: y.chunk(2, dim=1),
    "a view and its base": lambda net, x, y: (y, y[:, 1:, ::2]),
    "a slice": lambda net, x, y: y[:, :, 1:3],
    "expanded": lambda net, x, y: y[:1].expand(3, -1, -1, -1),
    "transposed": lambda net, x, y: y.transpose(1, 3),
    "nothing in it": lambda net, x, y: (y[:0], y),
    "indexed": lambda net, x, y: y[:, [0, 2]],
    "an activation by a function": lambda net, x, y: torch.relu(net.conv(y)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_any_form(name: str, gpu: FakeGpu) -> None:
    """Lying and sharing memory as in the plain network, and never written to again."""
    fused, plain = pair(lambda: Returns(RESULTS[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept, expected = check(fused, plain), check(plain, plain)
        check(fused, plain, image() * 2)
    assert_same(kept, expected, TOLERANCE)
    leaves, others = (torch.utils._pytree.tree_leaves(one) for one in (kept, expected))
    tensors = [(a, b) for a, b in zip(leaves, others, strict=True) if isinstance(a, Tensor)]
    assert [a.stride() for a, _ in tensors] == [b.stride() for _, b in tensors]
    places = [[one.untyped_storage().data_ptr() for one in some] for some in zip(*tensors, strict=True)]
    assert len({*places[0]}) == len({*places[1]})
    assert gpu.replays == [2]


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "its input": (lambda net, x, y: (x, y), "returns an input or a parameter, or a view"),
    "a view of its input": (lambda net, x, y: (x[0], y), "returns an input or a parameter, or a view"),
    "a parameter": (lambda net, x, y: (net.conv.bias, y), "returns an input or a parameter, or a view"),
    "input overwritten": (lambda net, x, y: y + x.mul_(2), "overwrites an input"),
    "shape by values": (lambda net, x, y: y[y > 0], "index.Tensor, whose result decides"),
    "a number": (lambda net, x, y: y.sum().item(), "_local_scalar_dense"),
    "elsewhere": (lambda net, x, y: y.to("meta"), "with a tensor on meta"),
    "unknown function": (lambda net, x, y: wrapped(y), "calls wrapped, whose Python code"),
}


@torch.fx.wrap
def wrapped(x: Tensor) -> Tensor:
    return x * 2


class Own(nn.Module):
    """Of no library, and followed by no trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class WithOwn(Group):
    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(super().forward(x))


class Branching(Group):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    name: (lambda function=function: Returns(function), why) for name, (function, why) in REFUSED.items()
}
NETWORKS["unknown module"] = (WithOwn, "calls Own, whose Python code .*reduce-overhead")
NETWORKS["Python code"] = (Branching, "runs as Python code .*reduce-overhead")


@pytest.mark.parametrize("name", NETWORKS)
def test_what_no_graph_can_do_is_launched_and_said_once(name: str, gpu: FakeGpu) -> None:
    build, why = NETWORKS[name]
    fused, plain = pair(build)
    x, y = image(), image()
    with torch.no_grad():
        with pytest.warns(UserWarning, match=f"launches its kernels one by one: .*{why}"):
            results = [fused(x)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(fused(x))
        expected = [plain(y), plain(y)]
    if name != "elsewhere":
        assert_same([results, x], [expected, y], TOLERANCE)
    assert not gpu.graphs
    assert why.partition(" .*")[0] in " ".join(fused_cna.report(fused).cuda_graphs or ())


def test_a_capture_that_fails(gpu: FakeGpu) -> None:
    fused, plain = pair()
    gpu.fails, before = True, gpu.current_stream()
    with pytest.warns(UserWarning, match="its capture failed: operation not permitted when stream is capt"):
        check(fused, plain)
    assert gpu.current_stream() is before
    assert gpu.generator.state == "before"
    assert gpu.ended == gpu.pools
    gpu.fails = False
    check(fused, plain)
    check(fused, plain, image()[:1])
    assert gpu.replays == [0]


def test_a_network_that_fails_says_so(gpu: FakeGpu) -> None:
    fused, _ = pair()
    for _ in range(10):
        with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"), torch.no_grad():
            fused(image()[:, :3])
    assert not gpu.graphs
    assert fused_cna.report(fused).cuda_graphs == ()


def test_within_other_captures_and_transforms_calls_are_plain(gpu: FakeGpu) -> None:
    fused, plain = pair()
    check(fused, plain)
    with torch.no_grad():
        outer = torch.cuda.CUDAGraph()
        with torch.cuda.graph(outer, pool=None, stream=Stream(), capture_error_mode="global"):
            y = fused(x := image())
        x.copy_(image() * 2)
        outer.replay()
        assert_same(y, plain(x), TOLERANCE)
        vmapped = torch.func.vmap(fused)(image()[None])
        assert_same(vmapped[0], plain(image()), TOLERANCE)
        assert_same(torch.jit.trace(fused, image(), check_trace=False)(image()), plain(image()), TOLERANCE)
    assert gpu.replays == [1, 1]


def test_streams_wait_for_each_other(gpu: FakeGpu) -> None:
    fused, plain = pair()
    first, second = Stream(), Stream()
    for stream in (first, first, second, first):
        with gpu.stream(stream):
            check(fused, plain)
            check(fused, plain, image()[:1])
    assert [one for one in first.waited_for if one in (first, second)] == [second]
    assert second.waited_for == [first]


def test_threads_take_turns(gpu: FakeGpu) -> None:
    fused, plain = pair()
    check(fused, plain)
    gpu.pause = lambda: time.sleep(1e-4)

    def call(seed: int) -> None:
        for _ in range(5):
            check(fused, plain, image() * seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(8)))
    assert gpu.replays == [41]


def test_everything_goes_with_the_network(gpu: FakeGpu) -> None:
    """Not only when the garbage collector comes by: on a GPU that may be too late."""
    fused, plain = pair()
    check(fused, plain)
    held = [weakref.ref(one) for one in (fused.conv.weight, fused.act, *gpu.graphs)]
    gpu.graphs.clear()
    gc.collect()
    gc.disable()
    try:
        del fused
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_report(gpu: FakeGpu) -> None:
    fused, _ = pair()
    assert "CUDA graphs: none yet" in str(fused_cna.report(fused))
    report = fused_cna.report(fused, image())
    assert report.cuda_graphs == ("2x4x8x9 float64: replayed",)
    assert "CUDA graph of 2x4x8x9 float64: replayed" in str(report)
    assert fused_cna.report(fused_cna.fuse(Group())).cuda_graphs is None


def test_on_a_cpu_it_is_the_plain_fused_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    fused, plain = pair()
    check(fused, plain)
    branching, plain = pair(Branching)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(branching, plain)


def test_not_of_a_snapshot() -> None:
    with pytest.raises(
        ValueError, match="freeze=True is for inference on a CPU and cuda_graphs=True for a GPU"
    ):
        fused_cna.fuse(Group(), freeze=True, cuda_graphs=True)
