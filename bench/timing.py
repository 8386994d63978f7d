"""Clocks, interleaved repeats, rotating operands and outputs, CUDA graphs."""

import gc
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fused_cna._device_timer import CACHES_TO_OUTRUN, MOST_INPUT_SETS

ALIGNMENT_BYTES = 256
FEWEST_ROUNDS = 3
FEWEST_SETS = 2
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


def repeated(call: Callable[[], object], calls: int) -> Work:
    """So many calls of the same."""
    return Work(_repeated(call, calls), calls)


def _repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            run()

    return work


@dataclass(frozen=True)
class Rotation:
    """How many sets of operands and outputs a layer is called with in turn, and whether a cache holds them.

    As fused_cna.tune does it: input, weight, residual and output, because in a network each of them was last
    touched a whole pass ago. A few small sets fit the cache all the same, as the number of sets is bounded.
    """

    sets: int
    set_bytes: int
    cache_bytes: int

    @property
    def outruns_cache(self) -> bool:
        return self.sets * self.set_bytes >= CACHES_TO_OUTRUN * self.cache_bytes

    def as_json(self) -> dict[str, int | bool]:
        return {**asdict(self), "outruns_cache": self.outruns_cache}


def rotation_of(set_bytes: int, cache_bytes: int) -> Rotation:
    """Enough sets to outrun the cache three times, as far as the bound on their number allows."""
    wanted = math.ceil(CACHES_TO_OUTRUN * cache_bytes / set_bytes)
    return Rotation(min(max(wanted, FEWEST_SETS), MOST_INPUT_SETS), set_bytes, cache_bytes)


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

    def free(self) -> None:
        """Give all memory that nothing uses back to the device."""
        self._numbers = self._numbers.new_empty(0)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

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


def rotating(calls: Sequence[Call], recent: deque[Tensor] | None = None) -> Work:
    """A work that makes the next of the calls each time, launched eagerly.

    Its output joins the `recent` ones, or it would lie where the last one did, which the cache still holds.
    Works that are not timed at once may share them, and so the memory.
    """
    turns = itertools.cycle(calls)
    kept = deque(maxlen=len(calls)) if recent is None else recent
    return Work(lambda: kept.append(next(turns)()))


@dataclass(frozen=True)
class CapturedCalls:
    """Calls in a CUDA graph; `first_output` is what the first of them writes."""

    graph: "torch.cuda.CUDAGraph"
    first_output: Tensor
    work: Work


def captured(calls: Sequence[Call]) -> CapturedCalls:
    """Capture all calls in one graph. The warm-up on a side stream lets libraries choose algorithms first."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer of the two restores the stream, which torch leaves at its own where a capture fails.
    with torch.cuda.stream(current), torch.cuda.graph(graph):
        # All are kept until the last is made, or they would share memory.
        outputs = [call() for call in calls]
    return CapturedCalls(graph, outputs[0], Work(graph.replay, len(calls)))
