"""One route of a layer or of a network: is its answer right, and how long does it take?"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.checks import POISON, RIVAL_ROOM, allowed_error
from bench.setting import Precision, Setting
from bench.stats import Summary, summarize
from bench.timing import Call, Work, captured, interleaved, rotating, stopwatch_for

Works = dict[str, Work]
Made = TypeVar("Made", bound="Entry")
SUMMARIES = ("seconds", "speedups")


@dataclass
class Entry:
    """One route in one memory format. `refused` says why it was not timed.

    `no_graph` says why it is not in a CUDA graph. `samples` are seconds per call, by way of launching, while
    they are taken; `seconds` sums them up.
    """

    route: str
    memory_format: str
    ours: bool
    refused: str | None = None
    error: float | None = None
    no_graph: str | None = None
    first_call_seconds: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, Summary] = field(default_factory=dict)

    def summarize(self) -> None:
        self.seconds = {launch: summarize(samples) for launch, samples in self.samples.items()}

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "samples"}

    @classmethod
    def from_json(cls: type[Made], content: dict[str, Any]) -> Made:
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        for name in known.keys() & set(SUMMARIES):
            known[name] = {launch: Summary(**summary) for launch, summary in known[name].items()}
        # JSON has no infinity: it is a word there.
        return cls(**known | {"error": None if content["error"] is None else float(content["error"])})


def attempt(entry: Entry, device: torch.device, prepare: Callable[[], Works]) -> Works:
    """What `prepare` returns; nothing, and why in the entry, where a library, compiler or fuser raises."""
    try:
        return prepare()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        entry.refused = first_line(error)
        raise_if_lost(device)
        return {}


def works_of(
    entry: Entry,
    calls: Sequence[Call],
    error_of: Callable[[Tensor], float],
    device: torch.device,
    recent: deque[Tensor] | None = None,
) -> Works:
    """What is to be timed for each way of launching, with what a CUDA graph writes checked by `error_of`."""
    works = {"launched": rotating(calls, recent)}
    if device.type != "cuda":
        return works
    try:
        graph = captured(calls)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        entry.no_graph = first_line(error)
        raise_if_lost(device)
        return works
    graph.first_output.fill_(POISON)
    graph.graph.replay()
    entry.error = max(entry.error or 0.0, error_of(graph.first_output))
    return works | {"graph": graph.work}


def raise_if_lost(device: torch.device) -> None:
    """A library that refuses leaves a GPU alive; one that is lost raises once more."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def time_entries(
    entries: Sequence[Entry],
    works: dict[tuple[int, str], Work],
    setting: Setting,
    limit_seconds: float,
    warmup: int = 2,
) -> None:
    """Time all works side by side and file the samples with their entries, which the keys count."""
    samples = interleaved(
        works,
        stopwatch_for(setting.device),
        rounds=setting.effort.rounds,
        sample_seconds=setting.effort.sample_seconds,
        limit_seconds=limit_seconds,
        warmup=warmup,
    )
    for (index, launch), seconds in samples.items():
        entries[index].samples[launch] = seconds
    for entry in entries:
        entry.summarize()


def judge(
    entries: Sequence[Entry], precision: Precision, eager_routes: Sequence[str], room: float = 1
) -> str | None:
    """Refuse what computes something else, and say what is wrong with ours; None if nothing is.

    The bound refers to the error of eager PyTorch in the same memory format; ours has `room` times it.
    """
    failures = []
    eager = {entry.memory_format: entry.error or 0.0 for entry in entries if entry.route in eager_routes}
    for entry in entries:
        if entry.error is not None:
            room_here = room if entry.ours else RIVAL_ROOM
            allowed = allowed_error(eager.get(entry.memory_format, 0.0), precision, room_here)
            if entry.error > allowed:
                entry.refused = (
                    f"wrong result: relative error {entry.error:.2e}, at most {allowed:.2e} is allowed"
                )
        if entry.ours:
            no_graph = entry.no_graph and f"not in a CUDA graph: {entry.no_graph}"
            name = f"{entry.route} ({entry.memory_format})"
            failures += [f"{name}: {why}" for why in (entry.refused, no_graph) if why]
    return "; ".join(failures) or None
