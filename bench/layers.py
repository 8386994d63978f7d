"""Single layers of real networks: fused against every other route, with errors and roofline."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.checks import checked_images, error_of, first_call
from bench.entry import Entry, Works, attempt, first_line, judge, time_entries, works_of
from bench.layer_result import BASELINE, LayerResult, compare
from bench.networks import NETWORKS, source_of
from bench.plans import plan_of
from bench.provenance import device_name
from bench.roofline import Ceilings, floor, flops, least_bytes, measure_ceilings
from bench.routes import ROUTES, Case, Route, make_case, memory_formats, reference
from bench.rows import Row, layers_of, network_floor, ordered_rows
from bench.setting import PRECISIONS, Setting
from bench.summary import LayersResult
from bench.timing import InputSets, RandomPool, Work, cache_bytes_of, rotation_of
from fused_cna._device_timer import no_search

SECONDS_BETWEEN_SAVES = 30.0


def run(
    setting: Setting,
    step: Callable[[str], None],
    *,
    earlier: Sequence[LayerResult] = (),
    earlier_ceilings: Mapping[str, Ceilings] | None = None,
    keep: float = 0.0,
    save: Callable[[LayersResult], object] = lambda outcome: None,
) -> LayersResult:
    """Measure the ceilings, then every row of the suites, most telling first.

    Stops when the budget but for `keep` seconds is spent, and when the run is interrupted. What `earlier` has
    is not measured again and stays in the result. `save` gets unfinished results.
    """
    ceilings = dict(earlier_ceilings or {})
    for precision in setting.precisions:
        if precision.name not in ceilings:
            step(f"ceilings: large copy, large matrix product, {precision.name}")
            ceilings[precision.name] = measure_ceilings(setting.device, precision, seed=setting.seed)
    names = [precision.name for precision in setting.precisions]
    rows = ordered_rows(setting.suites, setting.layer_batches, names, ceilings)
    outcome = _begin(setting, rows, ceilings, earlier)
    done = {result.row.key for result in earlier}
    dtypes = {precision.dtype for precision in setting.precisions}
    pools = {dtype: RandomPool(setting.device, dtype, setting.seed) for dtype in dtypes}
    saved = time.monotonic()
    for row in rows:
        if row.key in done:
            continue
        if not setting.budget.allows(keep):
            outcome.left_out.append(row.name)
            continue
        step(row.name)
        try:
            _attempt(row, setting, pools, ceilings[row.precision], outcome)
        except KeyboardInterrupt:
            setting.budget.interrupted = True
            outcome.left_out.append(row.name)
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            save(outcome)
            saved = time.monotonic()
    return outcome


def most_steps(setting: Setting) -> int:
    """How many steps a run has at most: ceilings, and each layer of each suite as often as it is wanted."""
    layers = {replace(layer, uses=1, role="") for suite in setting.suites for layer in layers_of(suite)}
    return len(setting.precisions) * (1 + len(setting.layer_batches) * len(layers))


def _begin(
    setting: Setting, rows: Sequence[Row], ceilings: dict[str, Ceilings], earlier: Sequence[LayerResult]
) -> LayersResult:
    """The result before anything is measured: what is planned, and what is there already."""
    outcome = LayersResult({}, ceilings, results=list(earlier), resumed=len(earlier))
    in_plan = {row.key: row for row in rows}
    for result in earlier:
        if result.row.key in in_plan:
            result.row.uses.update(in_plan[result.row.key].uses)
    asked = itertools.product((one.name for one in setting.precisions), setting.layer_batches, setting.suites)
    there = [(one.row.precision, one.row.batch, suite) for one in earlier for suite in one.row.uses]
    for precision, batch, suite in dict.fromkeys([*asked, *there]):
        outcome.suites[suite] = source_of(suite) if suite in NETWORKS else "data/conv_layers.csv"
        whole = [Row(one, batch, precision, {suite: one.uses}) for one in layers_of(suite)]
        outcome.planned[suite, batch, precision] = {
            one.key: network_floor(one, suite, ceilings[precision]) for one in whole
        }
    return outcome


def _attempt(
    row: Row,
    setting: Setting,
    pools: Mapping[torch.dtype, RandomPool],
    ceilings: Ceilings,
    outcome: LayersResult,
) -> None:
    """Measure a row and file it; one that does not fit the memory is tried once more with all of it free."""
    for tries_left in (1, 0):
        try:
            pool = pools[PRECISIONS[row.precision].dtype]
            outcome.results.append(measure(row, setting, pool, ceilings))
            return
        except torch.OutOfMemoryError:
            if not tries_left:
                outcome.too_large.append(row.name)
        except RuntimeError as error:
            outcome.broke_off.append(f"{row.name}: {first_line(error)}")
            return
        for pool in pools.values():
            pool.free()


def measure(row: Row, setting: Setting, pool: RandomPool, ceilings: Ceilings) -> LayerResult:
    """Check, then time, every route on one row, in the row's precision."""
    precision = PRECISIONS[row.precision]
    layer = row.layer
    case = make_case(layer, setting.device, precision.dtype, setting.seed)
    shapes = [(row.batch, layer.cin, layer.h, layer.w)]
    if layer.residual_order is not None:
        shapes.append((row.batch, layer.cout, layer.out_h, layer.out_w))
    output = row.batch * layer.cout * layer.out_h * layer.out_w
    numbers = sum(math.prod(shape) for shape in shapes) + case.conv.weight.numel() + output
    rotation = rotation_of(row.itemsize * numbers, cache_bytes_of(setting.device))
    recent: deque[Tensor] = deque(maxlen=rotation.sets)
    entries: list[Entry] = []
    works: dict[tuple[int, str], Work] = {}
    with precision.applied(), torch.inference_mode():
        for memory_format in memory_formats(layer, precision, setting.device):
            input_sets = pool.input_sets(shapes, rotation.sets, memory_format)
            cases = [case.laid_out(memory_format) for _ in input_sets]
            expected = _expected(case, input_sets[0])
            for route in ROUTES:
                entry = Entry(route.name, str(memory_format).removeprefix("torch."), route.ours)
                launches = _prepare(entry, route, cases, input_sets, expected, recent)
                entries.append(entry)
                works |= {(len(entries) - 1, launch): work for launch, work in launches.items()}
        time_entries(entries, works, setting, setting.effort.layer_limit_seconds)
    failure = judge(entries, precision, (BASELINE,))
    floor_time = floor(layer, row.batch, row.itemsize, ceilings)
    plan, why_no_plan = plan_of(row, setting.device, device_name(setting.device))
    return LayerResult(
        row=row,
        floor=floor_time,
        flops=flops(layer, row.batch),
        least_bytes=least_bytes(layer, row.batch, row.itemsize),
        rotation=rotation,
        entries=entries,
        comparisons=compare(entries, floor_time),
        against_baseline=compare(entries, floor_time, BASELINE),
        failure=failure,
        plan=plan,
        why_no_plan=why_no_plan,
    )


@no_search()
def _expected(case: Case, inputs: tuple[Tensor, ...]) -> Tensor:
    """The float64 answer for the checked images of one input set."""
    images = checked_images(inputs[0].shape[0])
    return reference(case, *(tensor[images] for tensor in inputs))


def _prepare(
    entry: Entry,
    route: Route,
    cases: Sequence[Case],
    input_sets: InputSets,
    expected: Tensor,
    recent: deque[Tensor],
) -> Works:
    """Check one route on poisoned memory, and make what is to be timed for each way of launching."""
    device = cases[0].device
    entry.refused = route.why_not(cases[0].layer, device)

    def prepare() -> Works:
        calls = [
            partial(route.prepare(case), *inputs) for case, inputs in zip(cases, input_sets, strict=True)
        ]
        entry.first_call_seconds = first_call(calls[0])
        entry.error = error_of(calls[0](), expected)
        return works_of(entry, calls, lambda output: error_of(output, expected), device, recent)

    return {} if entry.refused else attempt(entry, device, prepare)
