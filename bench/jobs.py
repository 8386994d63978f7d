"""What each job measures: the layers of suites, whole networks, and a single call."""

import copy
import gc
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases, networks, routes
from bench.cases import PRECISIONS, Layer, Precision, Row
from bench.measure import (
    Candidate,
    Run,
    Setting,
    Work,
    checked_images,
    event_seconds,
    host_seconds,
    input_sets,
    interleaved,
    measure,
    rotation_of,
)
from bench.networks import Case
from bench.overhead import parts_of
from bench.provenance import device_name
from bench.result import Entry, Record
from bench.routes import Route
from fused_cna._device_timer import no_search
from fused_cna.activation import describe
from fused_cna.plan import DEFAULT_DEVICE, explain, planner
from fused_cna.problem import ConvProblem

LAYER_BATCHES = (1, 8, 32, 128)
CALL_LAYER = Layer(16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 8, 8, "BatchNorm2d", "ReLU", "none", False)


def run_layers(run: Run) -> None:
    """Measure the ceilings, then every row of the suites, most telling first."""
    setting, outcome = run.setting, run.outcome
    for precision in setting.precisions:
        if precision.name not in outcome.ceilings:
            run.step(f"ceilings: large copy, large matrix product, {precision.name}")
            outcome.ceilings[precision.name] = measure_ceilings(setting, precision)
    names = [precision.name for precision in setting.precisions]
    rows = layer_rows(setting, {name: outcome.ceilings[name] for name in names})
    by_key = {row.key: row for row in rows}
    for record in outcome.records:
        if record.key in by_key:
            record.uses |= by_key[record.key].uses
    asked = itertools.product(setting.suites, {row.batch: 0 for row in rows}, names)
    there = ((suite, one.batch, one.precision) for one in outcome.records for suite in one.uses)
    for suite, batch, name in dict.fromkeys((*asked, *there)):
        whole = [Row(one, batch, name) for one in cases.layers_of(suite)]
        floors = {one.key: one.layer.uses * one.floor(outcome.ceilings[name])[0] for one in whole}
        outcome.planned[suite, batch, name] = floors
    for row in rows:
        run.measure(row.key, row.name, partial(measure_layer, row, run))


def measure_ceilings(setting: Setting, precision: Precision, *, small: bool = False) -> dict[str, Any]:
    """What the device can do: a large copy (bytes read plus written) and a large matrix product.

    The fastest sample of each counts: a ceiling is not what other work left of it. `small`: for tests.
    """
    copied, size = (1 << 16, 64) if small else (1 << 30, 8192) if setting.gpu else (1 << 27, 1536)
    dtype, device = precision.dtype, setting.device
    source = torch.randn(copied // dtype.itemsize, device=device, dtype=dtype)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    target, product = torch.empty_like(source), torch.empty_like(left)
    copy, matrix = (lambda: target.copy_(source)), (lambda: torch.mm(left, right, out=product))
    works, limits = {"copy": Work(copy), "matrix": Work(matrix)}, {"rounds": 20, "limit_seconds": 2.0}
    with precision.applied():
        stopwatch = event_seconds if setting.gpu else host_seconds
        samples = interleaved(works, stopwatch, sample_seconds=0.0 if small else 0.02, **limits)  # type: ignore[arg-type]
    return {
        "bytes_per_second": 2 * source.nbytes / min(samples["copy"]),
        "flops_per_second": 2 * size**3 / min(samples["matrix"]),
        "copied_bytes": source.nbytes,
        "matrix_size": size,
        "matrix_precision": (setting.gpu and precision.float32_products) or str(dtype)[6:],
    }


def layer_rows(setting: Setting, ceilings: dict[str, dict[str, Any]]) -> list[Row]:
    batches = setting.batches or (LAYER_BATCHES if setting.gpu else LAYER_BATCHES[:1])
    return cases.ordered_rows(setting.suites, batches, ceilings)


def formats_of(layer: Layer, precision: Precision, gpu: bool) -> tuple[torch.memory_format, ...]:
    """channels_last, and NCHW too wherever that may be faster.

    Tensor cores want channels_last of a dense layer, and cuDNN only converts what lies otherwise. Strict
    float32, groups and odd channel counts have kernels of their own for NCHW.
    """
    dense = layer.groups == 1 and layer.cin % 8 == 0 and layer.cout % 8 == 0
    only_last = gpu and dense and precision.float32_products != "ieee"
    return routes.FORMATS[:1] if only_last else routes.FORMATS


def measure_layer(row: Row, run: Run) -> Record:
    """All routes of one row, in the row's precision."""
    setting, layer, precision = run.setting, row.layer, PRECISIONS[row.precision]
    itemsize = precision.dtype.itemsize
    case = routes.make_case(layer, setting.device, precision, setting.seed)
    shapes = layer.shapes(row.batch)
    output = (row.batch, layer.cout, layer.out_h, layer.out_w)
    numbers = sum(math.prod(shape) for shape in (*shapes, output, case.conv.weight.shape))
    rotation = rotation_of(itemsize * numbers, setting.device)
    floor, bound = row.floor(run.outcome.ceilings[row.precision])
    plan, why_no_plan = plan_of(row, setting)
    facts = {
        "layer": asdict(layer),
        "floor": {"seconds": floor, "bound": bound},
        "flops": layer.flops(row.batch),
        "least_bytes": layer.least_bytes(row.batch, itemsize),
        "rotation": rotation,
        "plan": plan,
        "why_no_plan": why_no_plan,
    }

    def candidates() -> Iterator[Candidate]:
        for memory_format in formats_of(layer, precision, setting.gpu):
            inputs = input_sets(shapes, rotation["sets"], memory_format, case.conv.weight)
            sets = [(case.laid_out(memory_format), one) for one in inputs]
            with no_search():
                checked = checked_images(row.batch)
                expected = [routes.reference(case, *(tensor[checked] for tensor in inputs[0]))]
            for route in routes.LAYER_ROUTES:
                if setting.device.type in route.devices and memory_format in route.formats:
                    entry = entry_of(route, memory_format, _left_out(route, setting) or route.why_not(layer))
                    yield Candidate(entry, lambda _, r=route, s=sets: r.prepare(s), expected)

    record = Record("layer", row.key, row.name, row.batch, row.precision, row.uses, facts)
    with precision.applied():
        return measure(record, candidates(), setting)


def entry_of(route: Route, memory_format: torch.memory_format, refused: str | None = None) -> Entry:
    name = str(memory_format).removeprefix("torch.")
    return Entry(route.name, name, route.ours, route.eager, refused)


def _left_out(route: Route, setting: Setting) -> str | None:
    """By an option, so that the result says so."""
    if route.name in setting.without:
        return "left out by --without"
    return "left out by --no-compile" if route.compiles and not setting.compiled else None


def plan_of(row: Row, setting: Setting) -> tuple[dict[str, Any] | None, str | None]:
    """The planner's choice, or None and why there is none. On a CPU the one for its default GPU."""
    name = device_name(setting.device) if setting.gpu else DEFAULT_DEVICE
    try:
        known = planner().devices()
    except RuntimeError as error:
        return None, str(error)
    device = next((one for one in known if re.search(rf"\b{one}\b", name)), None)
    if device is None:
        return None, f"the planner does not know {name!r}; it knows {', '.join(known)}"
    layer, precision = row.layer, PRECISIONS[row.precision]
    act, _ = describe(routes.activation_module(layer.act) or nn.Identity()) or ("identity", ())
    sizes = (row.batch, layer.cin, layer.h, layer.w, layer.cout, layer.kh, layer.kw, *layer.geometry)
    options: Any = {"norm": layer.has_norm, "act": act, "residual": layer.residual_order}
    try:
        with precision.applied():
            chosen = explain(ConvProblem(*sizes, dtype=precision.dtype, **options), device=device)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        return None, str(error)
    fields = ("kernel", "tile", "split_k", "estimate_us")
    return {"device": device, **{name: getattr(chosen, name) for name in fields}}, None


def layer_steps(setting: Setting) -> int:
    unmeasured = {one.name: {"flops_per_second": 1.0, "bytes_per_second": 1.0} for one in setting.precisions}
    return len(setting.precisions) + len(layer_rows(setting, unmeasured))


def network_steps(setting: Setting) -> int:
    return len(network_turns(setting))


def run_networks(run: Run) -> None:
    """Measure every planned case, most telling first.

    Under a budget compiled routes come last, with all routes of their case measured anew beside them.
    """
    setting = run.setting
    images: list[Tensor] = []
    for compiled, case in network_turns(setting):
        reason = case.model.why_not()
        if reason is not None:
            run.outcome.left_out[case.name] = reason
            continue
        images = images or networks.photographs()
        taken = [
            route
            for route in routes.NETWORK_ROUTES
            if setting.device.type in route.devices
            and (compiled or not route.compiles)
            and (setting.max_autotune or route is not routes.NETWORK_AUTOTUNED)
            and (case.model.modules or route is not routes.MODULES)
            and route.name not in setting.without
        ]
        name = f"{case.name} (compiled routes)" if compiled and setting.budget.seconds else case.name
        made = partial(measure_network, case, taken, images, setting)
        with setting.precisions[0].applied():
            run.measure(case.name, name, made, [route.name for route in taken])
        gc.collect()  # copies of networks are large


def network_turns(setting: Setting) -> list[tuple[bool, Case]]:
    """Whether with the routes that compile, and what is measured, in order."""
    planned = networks.planned_cases(
        setting.networks, setting.batches, setting.precisions[0].name, gpu=setting.gpu, few=setting.few
    )
    twice = setting.compiled and setting.budget.seconds is not None
    return list(itertools.product((False, True) if twice else (setting.compiled,), planned))


def measure_network(case: Case, taken: Sequence[Route], images: list[Tensor], setting: Setting) -> Record:
    """Build and calibrate one network; all its routes."""
    network = networks.build_network(case, images, setting.device, setting.seed)
    plain = networks.image_sets(case, images, setting.device, setting.seed)
    with torch.inference_mode(), no_search():
        exact = copy.deepcopy(network).double()
        expected = [exact(x[checked_images(len(x))].double()) for x in plain]
        del exact

    def prepare(entry: Entry, route: Route, laid_out: nn.Module, sets: Sequence[Tensor]) -> list[Any]:
        call = routes.prepare_network(route, entry, laid_out, sets[0])
        return [partial(call, x) for x in sets]

    def candidates() -> Iterator[Candidate]:
        for memory_format in routes.FORMATS[::-1]:
            laid_out = copy.deepcopy(network).to(memory_format=memory_format)
            sets = [x.contiguous(memory_format=memory_format) for x in plain]
            for route in taken:
                if memory_format in route.formats:
                    made = partial(prepare, route=route, laid_out=laid_out, sets=sets)
                    yield Candidate(entry_of(route, memory_format), made, expected)

    facts = {"image_size": case.model.size, "images": networks.IMAGES}
    record = Record("network", case.name, case.name, case.batch, case.precision, {}, facts)
    measured = measure(record, candidates(), setting)
    if any(route.compiles for route in taken):
        torch._dynamo.reset()
    return measured


def run_overhead(run: Run) -> None:
    """Measure what a call of a tiny layer costs the host, whole and by parts."""
    with run.setting.precisions[0].applied():
        run.measure("call", "call overhead", partial(measure_call, run.setting))
        run.step("its parts")
        run.outcome.extra["parts"] = parts_of(run.setting, CALL_LAYER)


def measure_call(setting: Setting) -> Record:
    """Host time of a module of ours, of the three that it replaces, and of these in one module.

    On a GPU only the host's part is timed: the device is waited for between loops, which are short enough
    that its queue does not fill.
    """
    memory_format, precision = routes.FORMATS[not setting.gpu], setting.precisions[0]
    case = routes.make_case(CALL_LAYER, setting.device, precision, setting.seed).laid_out(memory_format)
    inputs = input_sets(CALL_LAYER.shapes(1), 1, memory_format, case.conv.weight)
    expected = [routes.reference(case, *inputs[0])]
    candidates = [
        Candidate(entry_of(route, memory_format), lambda _, r=route: r.prepare([(case, inputs[0])]), expected)
        for route in routes.CALL_ROUTES
    ]
    record = Record("call", "call", CALL_LAYER.name, 1, precision.name, {}, {"layer": asdict(CALL_LAYER)})
    return measure(record, candidates, setting)
