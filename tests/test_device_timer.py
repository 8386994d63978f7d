"""Timing plans on a device: samples, copies that outrun the cache, and results that must agree."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_cna import WrongResultError, _accuracy, _device_timer, _tuned, ops
from fused_cna._device_timer import DeviceTimer, check_results, input_sets, race, twin, typical
from fused_cna._recording import RecordedCall
from fused_cna.plan import planner
from fused_cna.tuning import select
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, channels_last
from tests.plans import plan_names
from tests.reference import DTYPES, Problem, Wanted, error_bound, integer_problem, random_problem
from tests.shapes import shape_named
from tests.simt import conv_norm_act as simulated
from tests.test_recording import recorded


def test_a_sample_far_from_the_others_does_not_count() -> None:
    assert typical([3.0, 1.0, 2.0]) == 2.0
    assert typical([1.0, 1.1, 0.9, 50.0, 1.0, 60.0]) == 1.0
    assert typical([2.0]) == 2.0
    assert typical([1.0, 1.0, 1.0, 9.0]) == 1.0


class Samplers:
    """Plans that take a given time, and the order in which they were timed."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.order: list[str] = []

    def all(self) -> dict[str, Callable[[], float]]:
        return {name: lambda name=name: self._sample(name) for name in self.seconds}

    def _sample(self, name: str) -> float:
        self.order.append(name)
        return self.seconds[name]


def test_every_round_begins_with_another_plan() -> None:
    plans = Samplers(a=1.0, b=1.1, c=1.2)
    assert race(plans.all(), rounds=3, screening=3) == {"a": 1.0, "b": 1.1, "c": 1.2}
    assert "".join(plans.order) == "abc" + "bca" + "cab"


def test_hopeless_plans_are_not_timed_to_the_end() -> None:
    plans = Samplers(slow=10.0, fast=1.0, near=1.4)
    assert race(plans.all(), rounds=10, screening=2) == {"slow": 10.0, "fast": 1.0, "near": 1.4}
    assert {name: plans.order.count(name) for name in plans.seconds} == {"slow": 2, "fast": 10, "near": 10}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_twin_lies_in_memory_as_the_original(layout: Layout) -> None:
    problem = random_problem(shape_named("3x3"), torch.float16)
    x = layout(problem.x)
    copy = twin(x)
    assert torch.equal(copy, x)
    assert (copy.shape, copy.stride()) == (x.shape, x.stride())
    assert copy.data_ptr() % 64 == x.data_ptr() % 64
    assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert recorded(problem.replace(x=copy)).key == recorded(problem.replace(x=x)).key


def test_copies_outrun_the_cache() -> None:
    problem = random_problem(shape_named("3x3"), torch.float16, Wanted("relu", residual_order="add_act"))
    arguments = problem.operator_arguments()
    used = sum(t.numel() * t.element_size() for t in (problem.x, problem.weight, problem.residual))
    sets = input_sets(arguments, output_bytes=100, cache_bytes=10 * (used + 100))
    assert len(sets) == 30
    assert sets[0] == tuple(arguments)
    for index in (0, 1, 14):
        assert len({s[index].data_ptr() for s in sets}) == 30
        assert all(torch.equal(s[index], arguments[index]) for s in sets)
    assert all(s[4] is arguments[4] for s in sets)
    assert len(input_sets(arguments, 100, 0)) == 2
    assert len(input_sets(arguments, 100, 1 << 40)) == _device_timer.MOST_INPUT_SETS


def simulator(problem: Problem, **wrong: Callable[[Tensor], Tensor]) -> Callable[[str], Tensor]:
    """Runs plans in the simulator, cuDNN's route eagerly; `wrong` spoils the results of a kernel's plans."""

    def run(name: str) -> Tensor:
        if name == "cudnn":
            y = ops.operator(*problem.operator_arguments())
        else:
            y = problem.call(simulated, plan=name)
        spoil = wrong.get(name.partition(" ")[0], lambda y: y)
        return spoil(y)

    return run


CHECKED = random_problem(shape_named("3x3"), torch.float16, Wanted("silu", residual_order="act_add")).map(
    lambda tensor: channels_last(tensor) if tensor.dim() == 4 else tensor
)


KERNELS = ("implicit_gemm_sm80", "direct")


def checked(run: Callable[[str], Tensor], problem: Problem = CHECKED) -> tuple[list[str], dict[str, str]]:
    """Some plans for the problem, and why some of these are left out."""
    eager = ops.operator(*problem.operator_arguments())
    names = [*(plan for kernel in KERNELS for plan in plan_names(problem, kernel)[:3]), "cudnn"]
    left_out = check_results(recorded(problem), names, run, eager)
    wrong = {name: str(error) for name, error in left_out.items() if isinstance(error, WrongResultError)}
    return [name for name in names if name not in left_out], wrong


@pytest.fixture(autouse=True)
def synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def planner_names(problem: Problem) -> list[str]:
    call = recorded(problem)
    return [c["name"] for c in planner().candidates(call.problem, "H100") if not c["illegal"]]


def test_right_results_pass() -> None:
    names, wrong = checked(simulator(CHECKED))
    assert not wrong
    assert {name.partition(" ")[0] for name in names} == {*KERNELS, "cudnn"}


def first_pixel_lost(y: Tensor) -> Tensor:
    y[0, :, 0, 0] = 0
    return y


def not_a_number(y: Tensor) -> Tensor:
    y[0, 0, 0, 0] = math.nan
    return y


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spoil", [first_pixel_lost, not_a_number, torch.zeros_like, torch.neg])
def test_a_wrong_kernel_is_left_out_whether_it_comes_first_or_not(
    kernel: str, spoil: Callable[[Tensor], Tensor]
) -> None:
    names, wrong = checked(simulator(CHECKED, **{kernel: spoil}))
    assert {name.partition(" ")[0] for name in names} == {*KERNELS, "cudnn"} - {kernel}
    assert wrong
    for name, why in wrong.items():
        assert name.startswith(kernel)
        assert f"plan '{name}' computed a wrong result for 3x3, " in why


def test_a_cudnn_route_less_accurate_than_the_kernels_is_left_out() -> None:
    names, wrong = checked(simulator(CHECKED, cudnn=lambda y: y * 1.002))
    assert names
    assert "cudnn" not in names
    assert not wrong


@pytest.mark.parametrize("kernel", [*KERNELS, "cudnn"])
def test_what_raises_is_left_out_unless_the_device_is_lost(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(y: Tensor) -> Tensor:
        raise RuntimeError("not supported")

    names, wrong = checked(simulator(CHECKED, **{kernel: refuse}))
    assert {name.partition(" ")[0] for name in names} == {*KERNELS, "cudnn"} - {kernel}
    assert not wrong

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        checked(simulator(CHECKED, **{kernel: refuse}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_measured_against_the_formula(dtype: torch.dtype) -> None:
    problem = integer_problem(shape_named("3x3_stride2"), dtype, Wanted("relu", residual_order="add_act"))
    arguments = problem.operator_arguments()
    right = problem.call(simulated)
    off = right.clone()
    off[1] *= 1 + 2.0**-6
    right_error, off_error = _accuracy.errors(arguments, [right, off])
    assert right_error <= _accuracy.error_bound(dtype, False, 0.0) < off_error < 2.0**-6


def test_the_bound_is_that_of_the_tests() -> None:
    for dtype in DTYPES:
        for eager_error in (0.0, 0.5):
            assert _accuracy.error_bound(dtype, False, eager_error) == error_bound(dtype, eager_error)
    assert _accuracy.error_bound(torch.float16, True, 0.0) == error_bound(torch.float16)
    assert 2.0**-11 < _accuracy.error_bound(torch.float32, True, 0.0) < 2.0**-10


def test_what_overflows_the_dtype_is_not_compared() -> None:
    exact = torch.tensor([1.0, 70000.0, math.nan, 2.0], dtype=torch.float64)
    assert _accuracy.relative_error(torch.tensor([1.0, math.inf, 3.0, 2.0]).half(), exact) == 0.0
    assert _accuracy.relative_error(torch.tensor([math.inf, math.inf, 3.0, 2.0]).half(), exact) == math.inf
    assert _accuracy.relative_error(torch.tensor([0.0, math.inf, 3.0, 2.0]).half(), exact) == pytest.approx(
        math.sqrt(1 / 5)
    )
    zero = torch.zeros(2, dtype=torch.float64)
    assert _accuracy.relative_error(torch.zeros(2), zero) == 0.0
    assert _accuracy.relative_error(torch.ones(2), zero) == math.inf


class FakeGpu:
    """torch.cuda as far as the timer uses it: graphs take the time that their plan is given here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.clock = 0.0
        self.plan = ""
        self.captured: dict[str, int] = {}
        self.capturing = False
        self.stream = "own"
        gpu = self

        class Graph:
            name, calls = "", 0

            def replay(self) -> None:
                gpu.clock += 1e-6 + self.calls * gpu.seconds[self.name]

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        @contextlib.contextmanager
        def graph(made: Graph, pool: object) -> Iterator[None]:
            assert pool == "pool"
            gpu.stream = "capturing"
            if gpu.seconds[gpu.plan] == math.inf:
                raise torch.OutOfMemoryError
            made.name, before = gpu.plan, gpu.captured.get(gpu.plan, 0)
            gpu.capturing = True
            yield
            gpu.capturing = False
            gpu.stream = "own"
            made.calls = gpu.captured[gpu.plan] - before

        @contextlib.contextmanager
        def forced_plan(name: str) -> Iterator[None]:
            gpu.plan = name
            yield
            gpu.plan = ""

        def operator(*arguments: Any) -> Tensor:
            assert gpu.plan, "every call is of a plan"
            if gpu.capturing:
                gpu.captured[gpu.plan] = gpu.captured.get(gpu.plan, 0) + 1
            y: Tensor = ops.operator(*arguments)
            return y

        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=30_000),
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "current_stream": lambda: gpu.stream,
            "set_stream": lambda stream: setattr(gpu, "stream", stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(_device_timer, "forced_plan", forced_plan)
        monkeypatch.setattr(_device_timer, "operator", operator)


@pytest.fixture
def small() -> RecordedCall:
    return recorded(
        random_problem(shape_named("3x3"), torch.float16, Wanted("relu", residual_order="add_act"))
    )


def test_the_device_timer_measures_every_plan(monkeypatch: pytest.MonkeyPatch, small: RecordedCall) -> None:
    seconds = {"a": 3e-6, "b": 2e-6, "c": 9e-6, "cudnn": 2.5e-6}
    gpu = FakeGpu(monkeypatch, seconds)
    measured = DeviceTimer()(small, list(seconds))
    sets = len(input_sets(small.arguments, 1024, 30_000))
    assert sets > 10
    assert gpu.captured == dict.fromkeys(seconds, sets)
    assert measured == pytest.approx([value + 1e-6 / sets for value in seconds.values()])


def test_a_plan_that_does_not_fit_the_memory_never_wins(
    monkeypatch: pytest.MonkeyPatch, small: RecordedCall
) -> None:
    gpu = FakeGpu(monkeypatch, {"a": math.inf, "b": 2e-6})
    first, second = DeviceTimer()(small, ["a", "b"])
    assert isinstance(first, torch.OutOfMemoryError)
    assert 2e-6 < second < 3e-6
    assert gpu.stream == "own", "a capture that fails leaves its stream current"
    FakeGpu(monkeypatch, {"a": math.inf, "b": math.inf})
    assert all(isinstance(why, torch.OutOfMemoryError) for why in DeviceTimer()(small, ["a", "b"]))


@pytest.mark.gpu
def test_every_plan_can_be_timed_on_a_gpu() -> None:
    needs_gpu()
    problem = random_problem(shape_named("3x3"), torch.float16, Wanted("relu", residual_order="add_act"))
    call = recorded(problem.map(lambda t: (channels_last(t) if t.dim() == 4 else t).cuda()))
    target = _tuned.cuda_target(0)
    names = [*select(planner().candidates(call.problem, dict(target.info)), 24), "cudnn"]
    seconds = DeviceTimer()(call, names)
    assert len(seconds) == len(names)
    assert all(
        (isinstance(taken, float) and 1e-7 < taken < 1e-2) or name == "cudnn"
        for name, taken in zip(names, seconds, strict=True)
    )
