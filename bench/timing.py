"""Clocks, interleaved repeats, rotating inputs, CUDA graphs."""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256
FEWEST_ROUNDS = 3
MAX_INPUT_SETS = 512
MIN_INPUT_SETS = 2
CACHES_TO_OUTRUN = 3
ASSUMED_CPU_CACHE = 32 << 20

Shape = tuple[int, int, int, int]
InputSets = list[tuple[Tensor, ...]]
Call = Callable[[], Tensor]
Key = TypeVar("Key", bound=Hashable)


class Stopwatch(Protocol):
    """Something that says how long a piece of work took, in seconds."""

    def seconds(self, work: Callable[[], object]) -> float: ...


class HostStopwatch:
    """perf_counter around the work: for a CPU, or for what a host spends on launching."""

    def seconds(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class EventStopwatch:
    """CUDA events around the work: the time on the device, or between launches where the host is slower."""

    def seconds(self, work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    return EventStopwatch() if device.type == "cuda" else HostStopwatch()


@dataclass(frozen=True)
class Work:
    """Something to time: `run()` makes `calls` calls of what is measured."""

    run: Callable[[], object]
    calls: int = 1


def interleaved(
    works: dict[Key, Work],
    stopwatch: Stopwatch,
    *,
    rounds: int,
    sample_seconds: float,
    limit_seconds: float = math.inf,
    warmup: int = 2,
    after_sample: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Seconds per call of each work, one sample of each per round.

    A sample repeats its work until it lasts about `sample_seconds`. Every round times every work, starting
    with another one each time, so that drift and position favour none. `after_sample` runs untimed.
    On a machine too slow for all `rounds`, none begins after `limit_seconds` of samples, but three are made.
    """
    repeats = {}
    for name, work in works.items():
        for _ in range(warmup):
            work.run()
        after_sample()
        once = stopwatch.seconds(work.run)
        after_sample()
        repeats[name] = max(1, math.ceil(sample_seconds / max(once, 1e-9)))
    samples: dict[Key, list[float]] = {name: [] for name in works}
    names = list(works)
    spent = 0.0
    for index in range(rounds):
        if index >= FEWEST_ROUNDS and spent > limit_seconds:
            break
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            elapsed = stopwatch.seconds(_repeated(works[name].run, repeats[name]))
            after_sample()
            spent += elapsed
            samples[name].append(elapsed / (repeats[name] * works[name].calls))
    return samples


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            run()

    return work


def input_sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of `set_bytes` outrun a cache of `cache_bytes` three times; between 2 and 512."""
    wanted = math.ceil(CACHES_TO_OUTRUN * cache_bytes / max(set_bytes, 1))
    return min(max(wanted, MIN_INPUT_SETS), MAX_INPUT_SETS)


def cache_bytes_of(device: torch.device) -> int:
    """The L2 cache of a CUDA device in bytes; on a CPU a fixed size, as its caches are not portably known."""
    return (
        torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else ASSUMED_CPU_CACHE
    )


class RandomPool:
    """Normally distributed numbers on a device, handed out as non-overlapping tensors.

    One pool serves all layers: drawing fresh numbers for each would cost more than the measurement.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        self._numbers = torch.empty(0, device=device, dtype=dtype)

    def input_sets(
        self, shapes: Sequence[Shape], count: int, memory_format: torch.memory_format
    ) -> InputSets:
        """`count` tuples with one tensor per shape (N, C, H, W), each aligned to 256 bytes."""
        sizes = [math.prod(shape) for shape in shapes]
        aligned = ALIGNMENT_BYTES // self._dtype.itemsize
        steps = [math.ceil(size / aligned) * aligned for size in sizes]
        total = sum(steps) * count
        if self._numbers.numel() < total:
            self._numbers = self._numbers.new_empty(0)
            self._numbers = torch.randn(
                total, device=self._device, dtype=self._dtype, generator=self._generator
            )
        sets, start = [], 0
        for _ in range(count):
            tensors = []
            for shape, size, step in zip(shapes, sizes, steps, strict=True):
                tensors.append(_shaped(self._numbers[start : start + size], shape, memory_format))
                start += step
            sets.append(tuple(tensors))
        return sets


def _shaped(numbers: Tensor, shape: Shape, memory_format: torch.memory_format) -> Tensor:
    n, c, h, w = shape
    if memory_format == torch.channels_last:
        return numbers.view(n, h, w, c).permute(0, 3, 1, 2)
    return numbers.view(shape)


def bound(call: Callable[..., Tensor], input_sets: InputSets) -> list[Call]:
    """A call for each input set."""
    return [partial(call, *inputs) for inputs in input_sets]


def rotating(calls: Sequence[Call]) -> Work:
    """A work that makes the next of the calls each time, launched eagerly."""
    turns = itertools.cycle(calls)
    return Work(lambda: next(turns)())


@dataclass(frozen=True)
class CapturedCalls:
    """Calls in a CUDA graph; `first_output` is what the first of them writes."""

    graph: "torch.cuda.CUDAGraph"
    first_output: Tensor
    work: Work


def captured(calls: Sequence[Call]) -> CapturedCalls:
    """Capture all calls in one graph. The warm-up on a side stream lets libraries choose algorithms first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first_output = calls[0]()
        for call in calls[1:]:
            call()
    return CapturedCalls(graph, first_output, Work(graph.replay, len(calls)))
