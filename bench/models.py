"""Whole networks: fused, eager and compiled, side by side, with the same answers checked in the same run."""

import copy
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.checks import NETWORK_ROOM, checked_images, error_of, first_call, largest_image_error
from bench.entry import Works, attempt, first_line, judge, time_entries, works_of
from bench.model_cases import (
    Case,
    Images,
    build,
    images_here,
    input_sets_of,
    planned_cases,
    why_not_installed,
)
from bench.model_result import ModelEntry, ModelResult, ModelsResult, compare
from bench.model_routes import EAGER, ModelRoute, routes_for
from bench.setting import PRECISIONS, Setting
from bench.timing import InputSets, Work, bound
from fused_cna._device_timer import no_search
from fused_cna.fusion.overlay import FusedNetwork
from fused_cna.fusion.records import records_of

ONLY_GOALS_COMPILE = (
    "on a CPU only networks with a goal are compiled, unless named by --model or given time by --budget"
)


def run(
    setting: Setting,
    step: Callable[[str], None],
    *,
    earlier: Sequence[ModelResult] = (),
    keep: float = 0.0,
    save: Callable[[ModelsResult], object] = lambda outcome: None,
) -> ModelsResult:
    """Measure every planned case, most telling first, until the budget but for `keep` seconds is spent.

    Under a budget, compiled routes come last, with all routes of their case measured anew beside them. What
    `earlier` has of a case with all its routes is not measured again. `save` gets unfinished results.
    """
    outcome = ModelsResult(setting.device.type == "cuda", list(earlier), len(earlier))
    images = images_here(setting.seed)
    installed = []
    for case in planned_cases(setting):
        reason = why_not_installed(case)
        if reason is None:
            installed.append(case)
        else:
            outcome.left_out[case.name] = reason
    for case, compiled in _turns(installed, setting):
        with_compiled = f"{case.name} (compiled routes)"
        name = case.name if setting.budget.seconds is None or not compiled else with_compiled
        if compiled and not _compiles(case, setting):
            outcome.left_out[with_compiled] = ONLY_GOALS_COMPILE
            compiled = False
        if _is_done(case, compiled, outcome, setting):
            continue
        if not setting.budget.allows(keep):
            outcome.left_out[name] = setting.budget.why_not
            continue
        step(name)
        try:
            _attempt(case, compiled, images, setting, outcome)
        except KeyboardInterrupt:
            setting.budget.interrupted = True
            outcome.left_out[name] = setting.budget.why_not
        save(outcome)
    return outcome


def most_steps(setting: Setting) -> int:
    """How many steps a run has at most."""
    return len(_turns(planned_cases(setting), setting))


def _turns(cases: Sequence[Case], setting: Setting) -> list[tuple[Case, bool]]:
    """What is measured in which order, and whether with the routes that compile."""
    if not setting.compiled:
        return [(case, False) for case in cases]
    if setting.budget.seconds is None:
        return [(case, True) for case in cases]
    return [(case, compiled) for compiled in (False, True) for case in cases]


def _compiles(case: Case, setting: Setting) -> bool:
    return (
        setting.device.type == "cuda"
        or setting.budget.seconds is not None
        or case.network in setting.networks
        or case.has_goal
    )


def _routes(compiled: bool, setting: Setting) -> list[ModelRoute]:
    return [route for route in routes_for(setting) if compiled or not route.compiles]


def _is_done(case: Case, compiled: bool, outcome: ModelsResult, setting: Setting) -> bool:
    there = next((result for result in outcome.results if result.case == case), None)
    return there is not None and all(there.entry(route.name) for route in _routes(compiled, setting))


def _attempt(case: Case, compiled: bool, images: Images, setting: Setting, outcome: ModelsResult) -> None:
    try:
        outcome.put(measure(case, _routes(compiled, setting), images, setting))
    except torch.OutOfMemoryError:
        outcome.left_out[case.name] = "it did not fit the device's memory"
    except RuntimeError as error:
        outcome.broke_off.append(f"{case.name}: {first_line(error)}")
    torch._dynamo.reset()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, routes: Sequence[ModelRoute], images: Images, setting: Setting) -> ModelResult:
    """Build and calibrate one network; check, then time, every route on it."""
    network = build(case, images, setting)
    plain_sets = input_sets_of(case, images, setting)
    expected = _expected(case, network, plain_sets)
    entries: list[ModelEntry] = []
    works: dict[tuple[int, str], Work] = {}
    for memory_format in dict.fromkeys(route.memory_format for route in routes):
        laid_out = copy.deepcopy(network).to(memory_format=memory_format)
        sets: InputSets = [(x.contiguous(memory_format=memory_format),) for (x,) in plain_sets]
        for route in routes:
            if route.memory_format == memory_format:
                entry, launches = _prepare(route, case, laid_out, sets, expected, setting.device)
                works |= {(len(entries), launch): work for launch, work in launches.items()}
                entries.append(entry)
    with torch.inference_mode():
        time_entries(
            entries,
            works,
            setting,
            setting.effort.network_limit_seconds,
            # On a CPU the check has warmed them up, and a network may take a second.
            warmup=0 if setting.device.type == "cpu" else 2,
        )
    result = ModelResult(
        case=case,
        image_size=case.model.size(setting.device),
        images=images.source,
        entries=entries,
        failure=judge(entries, PRECISIONS[case.precision], EAGER, NETWORK_ROOM),
    )
    compare(result, setting.device)
    return result


@no_search()
def _expected(case: Case, network: nn.Module, input_sets: InputSets) -> list[Tensor]:
    """The float64 answer for the checked images of every input set."""
    exact = case.model.answers(copy.deepcopy(network).double())
    with torch.inference_mode():
        return [exact(x[checked_images(len(x))].double()) for (x,) in input_sets]


def _prepare(
    route: ModelRoute,
    case: Case,
    network: nn.Module,
    input_sets: InputSets,
    expected: Sequence[Tensor],
    device: torch.device,
) -> tuple[ModelEntry, Works]:
    """Check one route on poisoned memory, and make what is to be timed for each way of launching."""
    entry = ModelEntry(route.name, str(route.memory_format).removeprefix("torch."), route.ours)
    entry.left_out = route.why_not()

    def prepare() -> Works:
        start = time.perf_counter()
        call = route.prepare(network, case.model, input_sets[0][0])
        entry.setup_seconds = time.perf_counter() - start
        if isinstance(call, nn.Module):
            entry.fused_calls, entry.conv_calls = calls_of(call)
        calls = bound(call, input_sets)
        with torch.inference_mode():
            entry.first_call_seconds = first_call(calls[0])
            outputs = [call() for call in calls]
            entry.error = max(_error(output, exact) for output, exact in zip(outputs, expected, strict=True))
            entry.agreement = _agreement(outputs, expected, case.model.classes)
            return works_of(entry, calls, lambda output: _error(output, expected[0]), device)

    if entry.left_out is not None:
        return entry, {}
    with warnings.catch_warnings(record=True) as warned:
        works = attempt(entry, device, prepare)
    entry.notes = list(dict.fromkeys(str(warning.message).partition("\n")[0] for warning in warned))
    return entry, works


_error = partial(error_of, measure=largest_image_error)


def calls_of(call: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """How many calls of convolutions a fused network has fused, and of how many; None for any other."""
    if not any(isinstance(module, FusedNetwork) for module in call.modules()):
        return None, None
    layers, _ = records_of(call)
    return sum(layer.fused for layer in layers), len(layers)


def _agreement(outputs: Sequence[Tensor], expected: Sequence[Tensor], classes: int | None) -> float:
    """The part of the checked images, or their pixels or anchors, whose top class is that of float64."""
    same = [
        (output[checked_images(len(output)), :classes].argmax(1) == other[:, :classes].argmax(1)).flatten()
        for output, other in zip(outputs, expected, strict=True)
    ]
    return float(torch.cat(same).double().mean())
