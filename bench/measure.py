"""The one path of everything that is measured: prepare, check, interleave, summarise."""

import itertools
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.cases import PRECISIONS, Precision
from bench.result import Entry, Outcome, Record, summarize
from fused_cna._accuracy import error_bound, relative_error
from fused_cna._device_timer import CACHES_TO_OUTRUN, MOST_INPUT_SETS
from fused_cna._graphs import capturing

FEWEST_ROUNDS, FEWEST_SETS = 3, 2
SAMPLE_SECONDS = 2e-3
ASSUMED_CPU_CACHE = 32 << 20
CHECKED_IMAGES = 8
SECONDS_BETWEEN_SAVES = 30.0
HOST_CALLS = 50
NETWORK_ROOM = 2.0
"""Roundings of dozens of layers compound by chance, so a network has more room than a layer."""
RIVAL_ROOM = 16.0
"""A rival beyond this computes something else. Wide: folding into 16-bit weights and tf32 are legitimate."""
POISON = 1e4
"""What no answer holds. Finite, because cuDNN's fused calls read their own unwritten output times zero."""

Call = Callable[[], Tensor]
Stopwatch = Callable[[Callable[[], object]], float]
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Budget:
    """Time that may be spent, in seconds; None is no limit. Who interrupts the run ends it."""

    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    interrupted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def allows(self, keep: float = 0.0) -> bool:
        """Whether more work may start with `keep` seconds to be left over."""
        left = self.seconds is None or self.clock() - self._start < self.seconds - keep
        return left and not self.interrupted

    @property
    def why_not(self) -> str:
        return "the run was interrupted" if self.interrupted else f"the {self.seconds:g} s were spent"


@dataclass(frozen=True)
class Setting:
    """One run of the bench. Jobs that take one precision and one batch take the first of each.

    `batches` and `networks` are empty where none was asked for: each job has its own. `few`: only the most
    telling networks. `without`: routes by name. Of each route `rounds` samples are taken, fewer where those
    of a layer or of a network would take longer than its seconds in all.
    """

    device: torch.device
    precisions: tuple[Precision, ...]
    budget: Budget
    suites: tuple[str, ...] = ("default",)
    batches: tuple[int, ...] = ()
    networks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    compiled: bool = True
    max_autotune: bool = False
    few: bool = False
    seed: int = 0
    rounds: int = 15
    layer_seconds: float = 3.0
    network_seconds: float = 20.0

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def host_seconds(work: Callable[[], object]) -> float:
    """perf_counter around the work: for a CPU, or for what a host spends on launching."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def event_seconds(work: Callable[[], object]) -> float:
    """CUDA events around the work: the time on the device, or between launches where the host is slower."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Work:
    """Something to time: `run()` makes `calls` calls of what is measured."""

    run: Callable[[], object]
    calls: int = 1

    def times(self, count: int) -> "Work":
        """The same `count` times, without a call of Python in between."""

        def run() -> None:
            for _ in range(count):
                self.run()

        return Work(run, self.calls * count)


def interleaved(
    works: dict[Key, Work],
    stopwatch: Stopwatch,
    *,
    rounds: int,
    sample_seconds: float = 0.0,
    limit_seconds: float = math.inf,
    warmup: int = 2,
    after_sample: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Seconds per call of each work, one sample of each per round.

    A sample repeats its work until it lasts about `sample_seconds`. Every round begins with another work, so
    that drift and position favour none. `after_sample` runs untimed. No round begins after `limit_seconds` of
    samples, but three are made.
    """
    samplers = {}
    for name, work in works.items():
        for _ in range(warmup):
            work.run()
        after_sample()
        once = stopwatch(work.run)
        after_sample()
        samplers[name] = work.times(max(1, math.ceil(sample_seconds / max(once, 1e-9))))
    samples: dict[Key, list[float]] = {name: [] for name in works}
    names, spent = list(works), 0.0
    for index in range(rounds if names else 0):
        if index >= FEWEST_ROUNDS and spent > limit_seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            elapsed = stopwatch(samplers[name].run)
            after_sample()
            spent += elapsed
            samples[name].append(elapsed / samplers[name].calls)
    return samples


def rotation_of(set_bytes: int, device: torch.device) -> dict[str, Any]:
    """How many sets of operands and outputs a layer is called with in turn, and whether a cache holds them.

    As fused_cna.tune does it: input, weight, residual and output, because in a network each of them was last
    touched a whole pass ago. Small sets fit the cache all the same, as the number of sets is bounded.
    """
    gpu = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if gpu else ASSUMED_CPU_CACHE
    sets = min(max(math.ceil(CACHES_TO_OUTRUN * cache / set_bytes), FEWEST_SETS), MOST_INPUT_SETS)
    outruns = sets * set_bytes >= CACHES_TO_OUTRUN * cache
    return {"sets": sets, "set_bytes": set_bytes, "cache_bytes": cache, "outruns_cache": outruns}


def input_sets(
    shapes: Iterable[Sequence[int]], count: int, layout: torch.memory_format, like: Tensor
) -> list[tuple[Tensor, ...]]:
    """`count` tuples with one tensor per shape (N, C, H, W): normally distributed, and copies of those.

    Always the same numbers, of the dtype and on the device of `like`.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=like.dtype, device=like.device)
    last = layout == torch.channels_last
    drawn = [random(n, h, w, c).permute(0, 3, 1, 2) if last else random(n, c, h, w) for n, c, h, w in shapes]
    return [tuple(drawn), *(tuple(tensor.clone() for tensor in drawn) for _ in range(count - 1))]


def rotating(calls: Sequence[Call], recent: deque[Tensor]) -> Work:
    """A work that makes the next of the calls each time, launched eagerly.

    Its output joins as many `recent` ones, or it would lie where the last one did, which the cache still
    holds. Works that are not timed at once share them, and so the memory.
    """
    turns = itertools.cycle(calls)

    def run() -> None:
        recent.append(next(turns)())
        if len(recent) > len(calls):
            recent.popleft()

    return Work(run)


def captured(calls: Sequence[Call]) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """All calls in one graph, and what the first of them writes."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their algorithms
            calls[0]()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        # All are kept until the last is made, or they would share memory.
        outputs = [call() for call in calls]
    return graph, outputs[0]


def allowed_error(eager_error: float, precision: Precision, room: float = 1.0) -> float:
    """The contract of our kernels, given the error of eager PyTorch, times the `room` that something has.

    An eager result that is not finite permits nothing.
    """
    known = eager_error if math.isfinite(eager_error) else 0.0
    return room * error_bound(precision.dtype, precision.float32_products == "tf32", known)


def checked_images(batch: int) -> list[int]:
    """Which images are compared with float64: at most 8, spread over the batch, first and last included."""
    count = min(batch, CHECKED_IMAGES)
    return [index * (batch - 1) // max(count - 1, 1) for index in range(count)]


def error_of(output: Tensor, expected: Tensor, *, by_image: bool = False) -> float:
    """The relative error of the checked images, or the largest of one; inf if anything is not finite."""
    if not bool(torch.isfinite(output).all()):
        return math.inf
    checked = output[checked_images(len(output))]
    pairs = zip(checked.split(1), expected.split(1), strict=True) if by_image else [(checked, expected)]
    return max(relative_error(one, exact) for one, exact in pairs)


def judge(record: Record) -> str | None:
    """Refuse what computes something else, and say what is wrong with ours; None if nothing is.

    The bound refers to the error of eager PyTorch in the same memory format.
    """
    failures, precision = [], PRECISIONS[record.precision]
    eager = {one.memory_format: one.error or 0.0 for one in record.routes if one.eager}
    for one in record.routes:
        room = RIVAL_ROOM if not one.ours else NETWORK_ROOM if record.kind == "network" else 1.0
        allowed = allowed_error(eager.get(one.memory_format, 0.0), precision, room)
        if one.error is not None and not one.error <= allowed:
            one.refused = f"wrong result: relative error {one.error:.2e}, at most {allowed:.2e} is allowed"
        if one.ours:
            no_graph = one.no_graph and f"not in a CUDA graph: {one.no_graph}"
            failures += [
                f"{one.route} ({one.memory_format}): {why}" for why in (one.refused, no_graph) if why
            ]
    return "; ".join(failures) or None


@dataclass
class Candidate:
    """A route to be tried: `prepare` makes a call for each input set, and may note things in the entry.

    `expected` are the float64 answers for the checked images of the first input sets.
    """

    entry: Entry
    prepare: Callable[[Entry], Sequence[Call]]
    expected: Sequence[Tensor]


def measure(record: Record, candidates: Iterable[Candidate], setting: Setting) -> Record:
    """Prepare and check every candidate but the refused, time those that are right side by side, compare.

    Of a call only the host's time is taken; on a GPU the device is waited for between samples.
    """
    works: dict[tuple[int, str], Work] = {}
    recent: deque[Tensor] = deque()
    for one in candidates:
        if one.entry.refused is None:
            found = _attempt(one, record.kind, recent, setting)
            works |= {(len(record.routes), launch): work for launch, work in found.items()}
        record.routes.append(one.entry)
    record.failure = judge(record)
    host, limits = record.kind == "call", {"layer": setting.layer_seconds, "network": setting.network_seconds}
    with torch.inference_mode():
        samples = interleaved(
            {key: work for key, work in works.items() if record.routes[key[0]].refused is None},
            host_seconds if host or not setting.gpu else event_seconds,
            rounds=setting.rounds * (5 if host else 1),
            sample_seconds=0.0 if host else SAMPLE_SECONDS,
            limit_seconds=limits.get(record.kind, math.inf),
            # On a CPU the check has warmed them up, and a network may take a second.
            warmup=2 if setting.gpu else 0,
            after_sample=torch.cuda.synchronize if host and setting.gpu else lambda: None,
        )
    for (index, launch), seconds in samples.items():
        record.routes[index].samples[launch] = seconds
        record.routes[index].seconds[launch] = summarize(seconds)
    record.compare()
    return record


def _attempt(one: Candidate, kind: str, recent: deque[Tensor], setting: Setting) -> dict[str, Work]:
    """What is to be timed by way of launching; nothing, and why in the entry, where something raises."""
    with warnings.catch_warnings(record=True) as warned:
        try:
            works = _prepare(one, kind, recent, setting)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            one.entry.refused, works = first_line(error), {}
            if setting.gpu:
                torch.cuda.synchronize()  # a library that refuses leaves a GPU alive; one that is lost raises
    one.entry.notes += dict.fromkeys(str(warning.message).partition("\n")[0] for warning in warned)
    return works


def _prepare(one: Candidate, kind: str, recent: deque[Tensor], setting: Setting) -> dict[str, Work]:
    """Check it on poisoned memory, launched and, on a GPU, in a CUDA graph; its works."""
    entry, expected, network = one.entry, one.expected, kind == "network"
    start = time.perf_counter()
    calls = one.prepare(entry)
    entry.setup_seconds = time.perf_counter() - start
    with torch.inference_mode():
        entry.first_call_seconds = first_call(calls[0])
        outputs = [call() for call, _ in zip(calls, expected, strict=False)]
        pairs = list(zip(outputs, expected, strict=True))
        entry.error = max(error_of(output, exact, by_image=network) for output, exact in pairs)
        if network:
            same = [
                output[checked_images(len(output))].argmax(1) == exact.argmax(1) for output, exact in pairs
            ]
            entry.agreement = float(torch.cat(same).double().mean())
        if kind == "call":
            return {"launched": Work(calls[0]).times(HOST_CALLS)}
        works = {"launched": rotating(calls, recent)}
        if not setting.gpu:
            return works
        try:
            graph, output = captured(calls)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:
            entry.no_graph = first_line(refusal)
            torch.cuda.synchronize()
            return works
        output.fill_(POISON)
        graph.replay()
        entry.error = max(entry.error, error_of(output, expected[0], by_image=network))
        return works | {"graph": Work(graph.replay, len(calls))}


def first_call(call: Call) -> float:
    """Seconds of a first call, with all that libraries search and compile in it.

    Its output is filled with a value that no answer holds, and as much free memory once more: an allocator
    that caches hands such memory to the next output, and what is then not written shows.
    """
    start = time.perf_counter()
    output = call()
    if output.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    output.fill_(POISON)
    torch.full_like(output, POISON)
    return seconds


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass
class Run:
    """How a job measures its things: within `keep` seconds of the budget, with `step` naming what begins."""

    setting: Setting
    outcome: Outcome
    step: Callable[[str], None]
    keep: float = 0.0
    save: Callable[[], object] = lambda: None

    def measure(self, key: str, name: str, thing: Callable[[], Record], routes: Iterable[str] = ()) -> None:
        """What `thing` makes, if the outcome has no record of that key with all `routes`, and in time."""
        budget, outcome = self.setting.budget, self.outcome
        known = [one for one in outcome.records if one.key == key]
        if known and set(routes) <= {entry.route for entry in known[0].routes}:
            return
        if not budget.allows(self.keep):
            outcome.left_out[name] = budget.why_not
            return
        self.step(name)
        try:
            outcome.put(thing())
        except torch.OutOfMemoryError:
            outcome.left_out[name] = "it did not fit the device's memory"
        except RuntimeError as error:
            outcome.broke_off.append(f"{name}: {first_line(error)}")
        except KeyboardInterrupt:
            budget.interrupted = True
            outcome.left_out[name] = budget.why_not
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()
            self._saved = time.monotonic()

    def __post_init__(self) -> None:
        self._saved = time.monotonic()
