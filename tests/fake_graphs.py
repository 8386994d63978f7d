"""CUDA graphs of tensors on a CPU: what a capture computes is recorded, and a replay computes it again.

As on a GPU the graph knows memory, not tensors: a replay reads what lies where its operands lay, and writes
where its results lay.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna.fusion import replay


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waited_for: list[object] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event.recorded_on)


class Event:
    recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream


class Generator:
    """That of a device's random numbers."""

    state: object = "before"

    def clone_state(self) -> object:
        return self.state

    def graphsafe_set_state(self, state: object) -> None:
        self.state = state


def _memory(values: Any) -> Any:
    """The same memory in tensors of its own."""
    return pytree.tree_map_only(Tensor, Tensor.detach, values)


class Graph(TorchDispatchMode):
    """A torch.cuda.CUDAGraph."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.replays = 0
        gpu.graphs.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._gpu.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self._calls.append((func, _memory(args), _memory(kwargs), _memory(pytree.tree_leaves(results))))
        return results

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, recorded in self._calls:
                for mine, result in zip(recorded, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(mine, Tensor) and mine.data_ptr() != result.data_ptr():
                        mine.copy_(result)
                self._gpu.pause()


class FakeGpu:
    """What torch.cuda is for graphs; all tensors are on it."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.pools: list[object] = []
        self.ended: list[object] = []
        """Pools to which the allocator was told to allocate no more."""
        self.fails = False
        """Whether an operator that is captured invalidates the capture."""
        self.generator = Generator()
        self.autocast_keeps_casts: list[bool] = []
        self._captures = 0
        self._thread = threading.local()
        self._default = Stream()
        self.pause: Any = lambda: None

    @property
    def replays(self) -> list[int]:
        """How often each graph was replayed, in the order of their captures."""
        return [graph.replays for graph in self.graphs]

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._thread, "stream", self._default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._thread.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._thread.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        is_own = capture_error_mode == "thread_local"
        assert not (is_own and gc.isenabled()), "the collector may destroy a graph"
        self._captures += 1
        assert self._captures == 1, "two captures at a time"
        self.pools.append(pool)
        self.autocast_keeps_casts.append(torch.is_autocast_cache_enabled())
        before, self._thread.stream = self.current_stream(), stream
        self._thread.capturing = True
        try:
            with graph:
                yield
        finally:
            self._captures -= 1
            self._thread.capturing = False
            if self.fails:
                self.generator.state = "waits for the end of the capture"
                # As torch 2.11 does, without the stream as it was.
                raise RuntimeError("operation failed due to a previous error during capture")
            self._thread.stream = before

    def set_stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    def is_current_stream_capturing(self) -> bool:
        return getattr(self._thread, "capturing", False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """From now on tensors on the CPU count as on a GPU that has graphs."""
    fake = FakeGpu()
    replaced = {
        "CUDAGraph": lambda: Graph(fake),
        "graph": fake.capture,
        "graph_pool_handle": object,
        "is_current_stream_capturing": fake.is_current_stream_capturing,
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "set_stream": fake.set_stream,
        "Stream": Stream,
        "Event": Event,
        "device": lambda device: contextlib.nullcontext(),
        "default_generators": {None: fake.generator},
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: fake.ended.append(pool))
    monkeypatch.setattr(replay, "_is_on_gpu", lambda x: True)
    return fake
