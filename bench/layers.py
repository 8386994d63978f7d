"""Single layers of real networks: fused against every other route, with errors and roofline."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.checks import poison, relative_error
from bench.layer_list import Layer, layers_of
from bench.layer_result import Entry, LayerResult, LayersResult, compare, judge
from bench.roofline import Ceilings, floor, flops, least_bytes, measure_ceilings
from bench.routes import ROUTES, Case, Route, make_case, reference
from bench.setting import Setting
from bench.timing import (
    InputSets,
    RandomPool,
    Work,
    cache_bytes_of,
    captured,
    input_sets_needed,
    interleaved,
    rotating,
    stopwatch_for,
)

SECONDS_KEPT_FOR_OVERHEAD = 10.0


def run(setting: Setting, step: Callable[[str], None]) -> LayersResult:
    """Measure the ceilings, then every layer of the suite until the budget ends."""
    layers = layers_of(setting.suite)
    step("ceilings: large copy, large matrix product")
    ceilings = measure_ceilings(setting.device, setting.dtype, seed=setting.seed)
    pool = RandomPool(setting.device, setting.dtype, setting.seed)
    batch = setting.batch_or(on_cpu=1, on_gpu=32)
    outcome = LayersResult(setting.suite, ceilings)
    for layer in layers:
        if not setting.budget.allows(SECONDS_KEPT_FOR_OVERHEAD):
            outcome.left_out.append(layer.name)
            continue
        step(layer.name)
        try:
            outcome.results.append(measure(layer, batch, setting, pool, ceilings))
        except RuntimeError as error:
            outcome.broke_off.append(f"{layer.name}: {_first_line(error)}")
    return outcome


def measure(layer: Layer, batch: int, setting: Setting, pool: RandomPool, ceilings: Ceilings) -> LayerResult:
    """Check, then time, every route on one layer."""
    case = make_case(layer, setting.device, setting.dtype, setting.seed)
    itemsize = setting.dtype.itemsize
    shapes = [(batch, layer.cin, layer.h, layer.w)]
    if layer.residual_order is not None:
        shapes.append((batch, layer.cout, layer.out_h, layer.out_w))
    set_bytes = itemsize * sum(n * c * h * w for n, c, h, w in shapes)
    count = input_sets_needed(set_bytes, cache_bytes_of(setting.device))
    entries: list[Entry] = []
    works: dict[tuple[int, str], Work] = {}
    with torch.inference_mode():
        for memory_format in case.memory_formats:
            input_sets = pool.input_sets(shapes, count, memory_format)
            expected = _expected(case, input_sets[0])
            for route in ROUTES:
                entry, launches = _prepare(route, case, input_sets, expected, memory_format)
                entries.append(entry)
                works |= {(len(entries) - 1, launch): work for launch, work in launches.items()}
        _time(entries, works, setting)
    failure = judge(entries, setting.dtype)
    floor_time = floor(layer, batch, itemsize, ceilings)
    return LayerResult(
        layer=layer,
        batch=batch,
        floor=floor_time,
        flops=flops(layer, batch),
        least_bytes=least_bytes(layer, batch, itemsize),
        input_sets=count,
        entries=entries,
        comparisons=compare(entries, floor_time),
        failure=failure,
    )


def _expected(case: Case, inputs: tuple[Tensor, ...]) -> Tensor:
    """The float64 answer for one input set. Searching cuDNN's float64 algorithms would only cost time."""
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        return reference(case, *inputs)
    finally:
        torch.backends.cudnn.benchmark = searching


def _prepare(
    route: Route, case: Case, input_sets: InputSets, expected: Tensor, memory_format: torch.memory_format
) -> tuple[Entry, dict[str, Work]]:
    """Check one route on poisoned memory, and make what is to be timed for each way of launching."""
    entry = Entry(route.name, str(memory_format).removeprefix("torch."), route.ours)
    entry.refused = route.why_not(case.layer, case.device)
    if entry.refused is not None:
        return entry, {}
    try:
        call = route.prepare(case, memory_format)
        poison(call(*input_sets[0]))
        entry.error = relative_error(call(*input_sets[0]), expected)
        works = {"launched": rotating(call, input_sets)}
        if case.device.type == "cuda":
            graph = captured(call, input_sets)
            graph.first_output.fill_(torch.nan)
            graph.graph.replay()
            entry.error = max(entry.error, relative_error(graph.first_output, expected))
            works["graph"] = graph.work
    except RuntimeError as error:
        if case.device.type == "cuda":
            # A library that refuses leaves the device alive; a lost device raises here again.
            torch.cuda.synchronize()
        entry.refused = _first_line(error)
        return entry, {}
    return entry, works


def _first_line(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _time(entries: list[Entry], works: dict[tuple[int, str], Work], setting: Setting) -> None:
    """Time all works of a layer side by side and file the samples with their entries."""
    samples = interleaved(
        works,
        stopwatch_for(setting.device),
        rounds=setting.effort.rounds,
        sample_seconds=setting.effort.sample_seconds,
        limit_seconds=setting.effort.layer_limit_seconds,
    )
    for (index, launch), seconds in samples.items():
        entries[index].samples[launch] = seconds
