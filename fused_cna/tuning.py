"""Measures which plan is the fastest for each convolution of a model, and keeps the winners: :func:`tune`."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fused_cna import _extension, _tuned, ops, plan_file
from fused_cna._device_timer import CUDNN, DeviceTimer, WrongResultError
from fused_cna._progress import progress as shown_progress
from fused_cna._recording import RecordedCall, record
from fused_cna.plan import DEFAULT_DEVICE, decide, planner
from fused_cna.plan_file import TunedPlan

Timer = Callable[[RecordedCall, Sequence[str]], Sequence[float | Exception]]
"""Called with one recorded convolution and the names of its candidates: seconds each, in their order; for one
that could not be timed ``math.inf``, or the exception that says why."""

WORTH_TIMING = 4.0
"""Candidates estimated to take this many times longer than the best are not timed."""

KERNEL_WORTH_TIMING = 10.0
"""The same for the best candidate of each kernel: estimates of two kernels compare less well than of one."""


@dataclass(frozen=True)
class TunedLayer:
    """One distinct convolution of a model, and what tuning made of it."""

    convolution: str
    """In words: filter, stride, channels, size of the input, dtype."""
    names: tuple[str, ...]
    """The modules that run it, where they are known."""
    uses: int
    """How often one run of the model has it."""
    device: str
    before: str
    """The plan in force before, by name."""
    after: str
    """The plan in force now."""
    seconds: Mapping[str, float]
    """What was measured, by the name of the plan; infinity where a plan could not be timed."""
    left_out: Mapping[str, Exception] = field(default_factory=dict)
    """Why a plan could not be timed, by its name; a ``WrongResultError`` where it computed something else."""

    @property
    def seconds_before(self) -> float:
        """Of one call, with the plan in force before."""
        return self.seconds[self.before]

    @property
    def seconds_after(self) -> float:
        """Of one call, with the plan in force now."""
        return self.seconds[self.after]

    @property
    def changed(self) -> bool:
        return self.before != self.after

    @property
    def ratio(self) -> float:
        """How many times faster it became; 1 where nothing could be timed."""
        return self.seconds_before / self.seconds_after if self.seconds_after < math.inf else 1.0


@dataclass(frozen=True)
class TuneResult:
    """What :func:`tune` measured and changed; ``str`` gives a table to read."""

    layers: tuple[TunedLayer, ...]
    path: Path | None
    """The file that the plans were written to; None where they were not."""

    @property
    def changed(self) -> tuple[TunedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.changed)

    @property
    def seconds_before(self) -> float:
        """Of all convolutions, each as often as one run of the model has it."""
        return sum(layer.uses * layer.seconds_before for layer in self._timed)

    @property
    def seconds_after(self) -> float:
        """The same with the plans in force now."""
        return sum(layer.uses * layer.seconds_after for layer in self._timed)

    @property
    def _timed(self) -> tuple[TunedLayer, ...]:
        return tuple(
            layer for layer in self.layers if max(layer.seconds_before, layer.seconds_after) < math.inf
        )

    def __str__(self) -> str:
        rows = [_row(layer) for layer in sorted(self.changed, key=lambda layer: -layer.ratio)]
        before, after = self.seconds_before, self.seconds_after
        lines = [
            f"{len(self.changed)} of {len(self.layers)} convolutions run another plan than before",
            *(_aligned([_HEADER, *rows]) if rows else ()),
        ]
        if after > 0:
            lines.append(
                f"all convolutions of one run: {before * 1e6:.1f} us before, {after * 1e6:.1f} us now, "
                f"{before / after:.2f} times as fast"
            )
        if untimed := len(self.layers) - len(self._timed):
            lines.append(f"{untimed} could not be timed with the plan before, or at all, and are not counted")
        lines += self._about_left_out()
        lines.append("not saved" if self.path is None else f"saved in {self.path}")
        return "\n".join(lines)

    def _about_left_out(self) -> Iterator[str]:
        left_out = [(plan, error) for layer in self.layers for plan, error in layer.left_out.items()]
        if wrong := [error for _, error in left_out if isinstance(error, WrongResultError)]:
            yield f"WRONG RESULTS: {len(wrong)} plans were left out"
            yield from (f"  {error}" for error in wrong)
        raised: dict[str, list[Exception]] = {}
        for plan, error in left_out:
            if error not in wrong:
                raised.setdefault(plan.partition(" ")[0], []).append(error)
        for kernel, errors in raised.items():
            reason = str(errors[0]).partition("\n")[0] or type(errors[0]).__name__
            yield f"{kernel} could not be timed {len(errors)} times, first because: {reason}"


_HEADER = ("layer", "convolution", "uses", "before", "us", "now", "us", "ratio")


def _row(layer: TunedLayer) -> tuple[str, ...]:
    others = f" and {len(layer.names) - 1} more" if len(layer.names) > 1 else ""
    return (
        layer.names[0] + others if layer.names else "",
        layer.convolution,
        str(layer.uses),
        layer.before,
        f"{layer.seconds_before * 1e6:.1f}",
        layer.after,
        f"{layer.seconds_after * 1e6:.1f}",
        f"{layer.ratio:.2f}",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def tune(
    model: Callable[..., Any],
    example_inputs: Any,
    *,
    timer: Timer | None = None,
    device: str | None = None,
    limit: int = 24,
    save: bool = True,
    progress: bool = True,
) -> TuneResult:
    """Time the plans for every convolution of a model on its GPU, and run the fastest from now on.

    Runs the model once in inference mode, takes every distinct convolution that reaches the operator with its
    tensors, and times those plans that the planner thinks worth it, cuDNN's convolution with the norm folded
    per call among them. Every result is compared with the others before its plan may win: one that computes
    something else is left out, with a ``RuntimeWarning``, and the result names it. The winners are used by
    this process at once, and by later ones through a file: ``FUSED_CNA_PLAN_FILE``, else
    ``fused_cna/plans.json`` in the user's cache folder, which is read when a GPU is first used. They are kept
    by device, version of fused_cna and problem, which is the sizes, dtype, memory layout and alignment of the
    tensors: tune with the batch sizes and image sizes that will be used.

    It wants the GPU for itself, and holds the input of each convolution until that is done. While a plan is
    timed, other threads' calls in this process run it too.

    Args:
        model: a module in eval mode, or anything that calls such; compiled or not. Under autocast, call this
            under autocast.
        example_inputs: for one run of it: a tensor, a tuple or list of positional arguments, or a dict of
            named ones, on the device where it will run.
        timer: times the candidates of one convolution instead of the GPU; see ``Timer``. Nothing is then run
            but the model, which may be on any device.
        device: what to plan for where the model runs on no GPU, which needs a ``timer``: a name that
            :func:`fused_cna.explain` takes, by default "H100".
        limit: how many candidates are timed per convolution at most.
        save: whether to write the file.
        progress: whether to show progress on stderr.

    Returns:
        What was measured and changed; print it.

    Raises:
        RuntimeError: there is no GPU and no ``timer``; nothing reached the operator (says what may be the
            cause); or the GPU was lost, after which the winners until then are kept.
        PlanFileError: the file cannot be written. Found out before anything is timed.
        ValueError: a ``device`` beside tensors on a GPU, a ``limit`` below 1, or a ``timer`` that does not
            return one time per candidate.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, but got {limit}")
    if timer is None:
        _check_gpu()
    path = plan_file.default_path() if save else None
    if path is not None:
        plan_file.check_writable(path)
    calls = record(model, example_inputs, planner())
    targets = [_target(call, timer, device) for call in calls]
    layers: list[TunedLayer] = []
    winners: list[tuple[_tuned.Target, TunedPlan]] = []
    try:
        with shown_progress("tuning", len(calls), progress) as step:
            # Each call is let go once it is timed, and with it the memory of its tensors.
            for target in targets:
                call = calls.pop(0)
                step(str(call))
                layers.append(_tune_one(call, target, timer or DeviceTimer(), limit))
                if (seconds := layers[-1].seconds_after) < math.inf:
                    winners.append((target, TunedPlan(call.key, layers[-1].after, round(seconds * 1e6, 3))))
    finally:
        _keep(winners, path)
    return TuneResult(tuple(layers), path)


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "fused_cna.tune times kernels on a GPU, and torch sees none here (torch.cuda.is_available() is "
            "False); run it on the machine that will run the model, or pass timer="
        )
    if not _extension.is_available():
        raise RuntimeError(f"fused_cna.tune has no kernels to time: {_extension.unavailable_reason()}")


def _target(call: RecordedCall, timer: Timer | None, device: str | None) -> _tuned.Target:
    if call.x.is_cuda and _extension.is_available():
        if device is not None:
            raise ValueError(
                f"the model ran on {call.x.device}, so device={device!r} has no meaning; omit it"
            )
        if why := ops.device_obstacle(call.x.device.index):
            raise RuntimeError(f"fused_cna.tune has no kernels to time: {why}")
        return _tuned.cuda_target(call.x.device.index)
    if timer is None:
        raise RuntimeError(
            f"fused_cna.tune times kernels on a GPU, but the model ran on {call.x.device}; move it and its "
            "inputs with .cuda(), or pass timer="
        )
    return _tuned.named_target(planner(), device or DEFAULT_DEVICE)


def select(candidates: Sequence[dict[str, Any]], limit: int) -> list[str]:
    """The names of the plans that are worth timing, the fastest by estimate first."""
    legal = [c for c in candidates if not c["illegal"]]
    fastest = legal[0]["estimate_us"]
    best_of_kernel: dict[str, dict[str, Any]] = {}
    for candidate in legal:
        best_of_kernel.setdefault(candidate["kernel"], candidate)
    wanted = {
        c["name"]: None for c in best_of_kernel.values() if c["estimate_us"] <= KERNEL_WORTH_TIMING * fastest
    }
    wanted |= {c["name"]: None for c in legal if c["estimate_us"] <= WORTH_TIMING * fastest}
    chosen = set(list(wanted)[:limit])
    return [name for name in dict.fromkeys(c["name"] for c in legal) if name in chosen]


def _tune_one(call: RecordedCall, target: _tuned.Target, timer: Timer, limit: int) -> TunedLayer:
    problem = dict(call.problem)
    before = decide(target, problem)[0]["name"]
    names = select(planner().candidates(problem, dict(target.info)), limit)
    names += [name for name in dict.fromkeys((before, CUDNN)) if name not in names]
    try:
        outcomes = list(timer(call, tuple(names)))
    except torch.OutOfMemoryError as error:
        outcomes = [error.with_traceback(None)] * len(names)
    times = [math.inf if isinstance(outcome, Exception) else float(outcome) for outcome in outcomes]
    if len(times) != len(names) or not all(seconds > 0 for seconds in times):
        raise ValueError(
            f"a timer must return a positive number of seconds for each of the {len(names)} candidates, "
            f"but for {call} it returned {times}"
        )
    seconds = dict(zip(names, times, strict=True))
    left_out = {name: o for name, o in zip(names, outcomes, strict=True) if isinstance(o, Exception)}
    for why in left_out.values():
        if isinstance(why, WrongResultError):
            warnings.warn(str(why), RuntimeWarning, stacklevel=3)
    layer = TunedLayer(
        convolution=str(call),
        names=tuple(call.names),
        uses=call.uses,
        device=target.device.name,
        before=before,
        after=before,
        seconds=seconds,
        left_out=left_out,
    )
    return replace(layer, after=min(names, key=seconds.__getitem__)) if min(times) < math.inf else layer


def _keep(winners: Sequence[tuple[_tuned.Target, TunedPlan]], path: Path | None) -> None:
    """Has this process run them, and writes them down."""
    for target in {target.device: target for target, _ in winners}.values():
        plans = [plan for at, plan in winners if at.device == target.device]
        _tuned.use(target, plans)
        if path is not None:
            plan_file.add(path, target.device, plans)
