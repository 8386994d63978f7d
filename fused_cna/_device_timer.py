"""Times plans of one convolution on its GPU, and leaves out those that raise or compute something else."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fused_cna import _accuracy, eager
from fused_cna._graphs import capturing
from fused_cna._recording import RecordedCall
from fused_cna.ops import operator
from fused_cna.plan import forced_plan

CUDNN = "cudnn"

CACHES_TO_OUTRUN = 3
MOST_INPUT_SETS = 256
SAMPLE_SECONDS = 1e-3
MOST_REPLAYS = 50
ROUNDS = 15
SCREENING_ROUNDS = 3
HOPELESS = 1.5
"""After the screening rounds, plans this many times slower than the fastest are not timed any further."""

OUTLIER_DEVIATIONS = 5
"""How many median absolute deviations from the median a sample may be."""

SLACK = 2.0
"""How far beyond the error bound a kernel's result may be before it counts as wrong.

The bound is stated for random data, and activations of a real network may cancel more. A lost row or a race
is off by far more than twice.
"""

_ALIGNMENT = 64  # bytes that torch's allocators align to at least, on every device
_OPERANDS = (0, 1, 14)  # x, weight and residual in the operator's arguments


class WrongResultError(RuntimeError):
    """A kernel computed something else than it should have; the message names the plan and the problem."""


def typical(samples: Sequence[float]) -> float:
    """The median, once samples far from it are dropped."""
    middle = median(samples)
    deviation = median(abs(sample - middle) for sample in samples)
    return median(s for s in samples if abs(s - middle) <= OUTLIER_DEVIATIONS * deviation)


def race(
    samplers: Mapping[str, Callable[[], float]], rounds: int = ROUNDS, screening: int = SCREENING_ROUNDS
) -> dict[str, float]:
    """Seconds per call of each plan, from samples taken in turns.

    Every round begins with another plan, so that drift and position favour none. After the first rounds
    those that are hopelessly slow stop.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    running = list(samplers)
    for index in range(rounds):
        first = index % len(running)
        for name in running[first:] + running[:first]:
            samples[name].append(samplers[name]())
        if index + 1 == screening:
            limit = HOPELESS * min(typical(samples[name]) for name in running)
            running = [name for name in running if typical(samples[name]) <= limit]
    return {name: typical(taken) for name, taken in samples.items()}


def check_results(
    call: RecordedCall, names: Sequence[str], run: Callable[[str], Tensor], eager_result: Tensor
) -> dict[str, RuntimeError]:
    """Runs every plan once and returns why some of them may not be used.

    The first right kernel is compared with the formula in float64, the others with that one. cuDNN's route is
    left out where it is less accurate than the kernels have to be, and whatever raises is left out as well.

    Raises:
        RuntimeError: the device was lost, so that nothing more can be run.
    """
    left_out: dict[str, RuntimeError] = {}

    def result(name: str) -> Tensor | None:
        try:
            return run(name)
        except RuntimeError as error:
            left_out[name] = _survived(error)
            return None

    by_cudnn = result(CUDNN) if CUDNN in names else None
    with no_search():
        eager_error, *cudnn_error = _accuracy.errors(
            call.arguments, [y for y in (eager_result, by_cudnn) if y is not None]
        )
    bound = _accuracy.error_bound(eager_result.dtype, bool(call.problem["allow_tf32"]), eager_error)
    if cudnn_error and not cudnn_error[0] <= bound:
        left_out[CUDNN] = RuntimeError(
            f"its relative error is {cudnn_error[0]:.3g}, where a kernel's is at most {bound:.3g}"
        )
    right: tuple[str, Tensor] | None = None
    for name in names:
        if name == CUDNN or (y := result(name)) is None:
            continue
        if right is None:
            with no_search():
                (error,) = _accuracy.errors(call.arguments, [y])
        else:
            error = _accuracy.relative_error(y, right[1])
        if not error <= SLACK * bound:
            against = "the formula in float64" if right is None else right[0]
            left_out[name] = WrongResultError(
                f"fused_cna's plan {name!r} computed a wrong result for {call}: it differs from {against} by "
                f"{error:.3g} (relative Frobenius norm), where {SLACK * bound:.3g} is allowed. This is a bug "
                "of fused_cna, or of the GPU; the plan was left out. Please report it"
            )
        elif right is None:
            right = name, y
    return left_out


def _survived(error: RuntimeError) -> RuntimeError:
    """A plan's error, without the tensors that its traceback holds; raises where the device is lost."""
    torch.cuda.synchronize()
    return error.with_traceback(None)


@contextmanager
def no_search() -> Iterator[None]:
    """cuDNN's search for the fastest algorithm switched off: seconds, for what runs once and is not timed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def twin(tensor: Tensor) -> Tensor:
    """A copy in memory of its own with the same strides and alignment, also where elements share memory."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    past_aligned = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
    memory = torch.empty(past_aligned + extent, dtype=tensor.dtype, device=tensor.device)
    memory[past_aligned:].copy_(tensor.as_strided((extent,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), past_aligned)


def input_sets(arguments: Sequence[Any], output_bytes: int, cache_bytes: int) -> list[tuple[Any, ...]]:
    """The arguments and copies of them, enough that a pass over all outruns the cache three times.

    The weight is copied as well: in a network it too was last used a whole pass ago.
    """
    operands = [arguments[i] for i in _OPERANDS if arguments[i] is not None]
    set_bytes = output_bytes + sum(tensor.numel() * tensor.element_size() for tensor in operands)
    count = min(max(math.ceil(CACHES_TO_OUTRUN * cache_bytes / set_bytes), 2), MOST_INPUT_SETS)
    sets = [tuple(arguments)]
    for _ in range(count - 1):
        copies = list(arguments)
        for i in _OPERANDS:
            if copies[i] is not None:
                copies[i] = twin(copies[i])
        sets.append(tuple(copies))
    return sets


class DeviceTimer:
    """Seconds per call of plans of one recorded call, measured on the GPU where its tensors are.

    Each plan is captured in a CUDA graph that goes through copies of the operands and as many outputs, so
    that nothing is still in the L2 cache when it is read. In place of the seconds of a plan that raised, does
    not fit the memory or computed something else is the exception that says so.

    Raises:
        RuntimeError: the device was lost.
    """

    def __call__(self, call: RecordedCall, names: Sequence[str]) -> list[float | Exception]:
        # Autocast has been applied to what was recorded.
        autocast = torch.autocast("cuda", enabled=False)
        with torch.cuda.device(call.x.device), torch.inference_mode(), autocast:
            with no_search():
                y = eager.conv_norm_act(*call.arguments)
            left_out = check_results(call, names, lambda name: _run(name, call.arguments), y)
            cache = torch.cuda.get_device_properties(call.x.device).L2_cache_size
            sets = input_sets(call.arguments, y.numel() * y.element_size(), cache)
            pool = torch.cuda.graph_pool_handle()
            samplers: dict[str, Callable[[], float]] = {}
            for name in names:
                if name not in left_out:
                    try:
                        samplers[name] = _Sampler(name, sets, pool).sample
                    except RuntimeError as error:
                        left_out[name] = _survived(error)
            seconds = race(samplers) if samplers else {}
            return [left_out[name] if name in left_out else seconds[name] for name in names]


def _run(name: str, arguments: Sequence[Any]) -> Tensor:
    with forced_plan(name):
        y: Tensor = operator(*arguments)
    return y


class _Sampler:
    """One plan in a CUDA graph, a call for each set of operands."""

    def __init__(self, name: str, sets: Sequence[tuple[Any, ...]], pool: Any) -> None:
        self._calls = len(sets)
        self._graph = torch.cuda.CUDAGraph()
        with forced_plan(name), capturing(self._graph, pool=pool):
            # All of them are kept until the last is made, or they would share memory.
            outputs = [operator(*arguments) for arguments in sets]
        del outputs
        self._replays = 1
        self._seconds()
        self._replays = min(max(math.ceil(SAMPLE_SECONDS / self._seconds()), 1), MOST_REPLAYS)

    def _seconds(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-9)

    def sample(self) -> float:
        return self._seconds() / (self._replays * self._calls)
