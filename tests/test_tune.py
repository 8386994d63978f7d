"""Tuning: what is recorded, what is timed, what wins, and that a wrong kernel never does."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import ConvNormAct, _accuracy, _device_timer, _extension, _tuned, ops, plan_file
from fused_cna._device_timer import WrongResultError, check_results, input_sets, race, twin, typical
from fused_cna._recording import RecordedCall, record
from fused_cna.plan import planner
from fused_cna.tuning import select
from tests.conftest import needs_gpu
from tests.layouts import LAYOUTS, Layout, channels_last
from tests.reference import DTYPES, Problem, Wanted, integer_problem, random_problem
from tests.shapes import SHAPES, shape_named
from tests.simt import conv_norm_act as simulated

Timer = Callable[[RecordedCall, Sequence[str]], Sequence[float]]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test keeps its plans; it knows none from elsewhere."""
    place = tmp_path / "plans.json"
    monkeypatch.setenv(plan_file.VARIABLE, str(place))
    monkeypatch.setattr(plan_file, "_warned", set())
    _tuned.forget()
    yield place
    _tuned.forget()


class Network(nn.Module):
    """Two equal blocks, one of which is used twice, one with a residual, and a call of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 16, 3, stride=2)
        self.a = ConvNormAct(16, 16, 3, act=nn.SiLU)
        self.b = ConvNormAct(16, 16, 3, act=nn.SiLU)
        self.head = nn.Parameter(torch.randn(8, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(self.a(self.stem(x))))
        return fused_cna.conv_norm_act(self.a(x, x), self.head)


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval().to(memory_format=torch.channels_last)


def image(*size: int) -> Tensor:
    return channels_last(torch.randn(*(size or (2, 3, 16, 16))))


def recorded(problem: Problem) -> RecordedCall:
    """A call of the operator as tuning sees it."""
    (call,) = record(lambda: ops.operator(*problem.operator_arguments()), (), planner())
    return call


def counting(call: RecordedCall, names: Sequence[str]) -> list[float]:
    """A timer for which every candidate takes longer than the one before."""
    return [1e-6 * (i + 1) for i in range(len(names))]


def favouring(kernel: str) -> Timer:
    """A timer for which every plan takes 10 us, but those of one kernel 2 us."""
    return lambda call, names: [2e-6 if name.startswith(kernel) else 1e-5 for name in names]


def test_every_distinct_convolution_is_recorded_once() -> None:
    stem, block, with_residual, head = record(network(), image(), planner())
    assert (stem.uses, stem.names) == (1, ["stem"])
    assert (block.uses, block.names) == (3, ["a", "b"])
    assert (with_residual.uses, with_residual.names) == (1, ["a"])
    assert (head.uses, head.names) == (1, ["head"])
    assert str(stem) == "3x3 stride 2, 3 to 16 channels, 2 x 16 x 16, tf32, norm + relu"
    assert str(with_residual) == "3x3, 16 to 16 channels, 2 x 8 x 8, tf32, norm + residual + silu"
    assert str(head) == "1x1, 16 to 8 channels, 2 x 8 x 8, tf32"
    assert block.problem["x_access"] == 16
    assert stem.problem["x_access"] == 4
    assert torch.equal(block.arguments[1], network().a.conv.weight)


def test_recording_changes_neither_results_nor_what_comes_after() -> None:
    model, x = network(), image()
    results: list[Tensor] = []
    record(lambda: results.append(model(x)), (), planner())
    assert not ops.operator_everywhere
    with torch.inference_mode():
        assert torch.equal(results[0], model(x))
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, (), planner())
    assert not ops.operator_everywhere


def test_inputs_come_in_any_form() -> None:
    block, x = ConvNormAct(4, 4).eval(), image(1, 4, 8, 8)
    keys = {
        record(block, inputs, planner())[0].key
        for inputs in (x, (x,), [x], {"x": x}, (x, None), {"x": x, "residual": None})
    }
    assert len(keys) == 1
    (with_residual,) = record(block, (x, x), planner())
    assert with_residual.problem["has_residual"]


def test_autocast_is_seen_as_the_kernel_would_see_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        calls = record(network(), image(), planner())
    assert {call.problem["dtype"] for call in calls} == {"bfloat16"}
    assert {call.arguments[0].dtype for call in calls} == {torch.bfloat16}


def test_a_compiled_model_is_recorded_too() -> None:
    model = network()
    eager = [call.key for call in record(model, image(), planner())]
    compiled = torch.compile(model, backend="eager")
    assert [call.key for call in record(compiled, image(), planner())] == eager


def test_meta_tensors_will_do() -> None:
    with torch.device("meta"):
        model, x = Network().eval(), torch.empty(2, 3, 16, 16)
    assert len(record(model, x, planner())) == 4


def test_what_no_kernel_takes_is_left_out() -> None:
    block = ConvNormAct(4, 4).eval()

    def mixed() -> None:
        block(torch.randn(1, 4, 8, 8))
        block(torch.randn(0, 4, 8, 8))
        ConvNormAct(4, 4).eval().double()(torch.randn(1, 4, 8, 8).double())

    assert len(record(mixed, (), planner())) == 1


def test_nothing_to_tune_is_an_error_that_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"training mode; call model\.eval\(\) first"):
        fused_cna.tune(ConvNormAct(3, 4), image(), timer=counting)
    with pytest.raises(RuntimeError, match=r"has no fused_cna\.ConvNormAct in eval mode"):
        fused_cna.tune(nn.Conv2d(3, 4, 3).eval(), image(), timer=counting)


needs_extension = pytest.mark.skipif(
    not _extension.is_available(), reason=f"needs the extension: {_extension.unavailable_reason()}"
)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_recorded_problem_is_the_one_that_the_kernel_plans_for(layout: Layout, dtype: torch.dtype) -> None:
    for name, wanted in (
        ("3x3", Wanted("relu", norm="none")),
        ("odd_channels", Wanted("silu", residual_order="act_add")),
        ("padding_asymmetric", Wanted("identity", residual_order="add_act")),
        ("1x1", Wanted("relu", residual_order="add_act")),
    ):
        problem = random_problem(shape_named(name), dtype, wanted)
        problem = problem.replace(x=layout(problem.x), weight=layout(problem.weight))
        call = recorded(problem)
        compiled = torch.ops.fused_cna._problem(*problem.operator_arguments()).tolist()
        numbered = dict(call.problem) | {"dtype": list(DTYPES).index(dtype)}
        assert compiled == [int(value) for value in numbered.values()]


@needs_extension
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_recorded_problem_follows_the_switch_of_torch(precision: str) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = precision
        problem = random_problem(shape_named("3x3"), torch.float32)
        fields = torch.ops.fused_cna._problem(*problem.operator_arguments()).tolist()
        call = recorded(problem)
        assert call.problem["allow_tf32"] == (precision == "tf32")
        assert fields[list(call.problem).index("allow_tf32")] == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def candidates(*plans: tuple[str, str, float]) -> list[dict[str, Any]]:
    return [{"name": n, "kernel": k, "estimate_us": e, "illegal": ""} for n, k, e in plans]


def test_candidates_far_from_the_best_estimate_are_not_timed() -> None:
    listed = candidates(
        ("a1", "a", 1.0),
        ("a2", "a", 3.9),
        ("a3", "a", 4.1),
        ("b1", "b", 9.0),
        ("b2", "b", 9.5),
        ("c1", "c", 11),
    )
    listed.append({"name": "d1", "kernel": "d", "estimate_us": 0.0, "illegal": "because"})
    assert select(listed, 24) == ["a1", "a2", "b1"]


def test_the_limit_leaves_the_best_of_each_kernel() -> None:
    listed = candidates(*((f"a{i}", "a", 1.0 + i / 100) for i in range(30)), ("b1", "b", 2.0))
    assert select(listed, 24) == [*(f"a{i}" for i in range(23)), "b1"]
    assert select(listed, 1) == ["a0"]


def test_plans_of_one_name_are_timed_once() -> None:
    assert select(candidates(("a", "a", 1.0), ("a", "a", 2.0)), 24) == ["a"]


def test_the_winner_is_in_force_at_once_and_in_the_file(path: Path) -> None:
    model, x = network(), image()
    result = fused_cna.tune(model, x, timer=favouring("direct"), progress=False)
    assert len(result.layers) == 4
    assert all(layer.after.startswith("direct") for layer in result.layers)
    assert result.path == path
    with torch.inference_mode():
        inner = model.stem(x)
    explanation = fused_cna.explain(model.a, inner)
    assert (explanation.is_tuned, explanation.kernel, explanation.tuned_us) == (True, "direct", 2.0)
    _tuned.forget()
    assert fused_cna.explain(model.a, inner).is_tuned
    path.unlink()
    assert not fused_cna.explain(model.a, inner).is_tuned


def test_a_saved_plan_is_the_one_before_of_the_next_time() -> None:
    first = fused_cna.tune(network(), image(), timer=favouring("direct"), progress=False)
    again = fused_cna.tune(network(), image(), timer=favouring("direct"), progress=False)
    assert [layer.before for layer in again.layers] == [layer.after for layer in first.layers]
    assert again.changed == ()
    assert again.seconds_before == again.seconds_after


def test_the_result_says_what_changed_and_by_how_much(path: Path) -> None:
    result = fused_cna.tune(network(), image(), timer=favouring("cudnn"), progress=False)
    stem, block = result.layers[:2]
    assert (block.uses, block.names) == (3, ("a", "b"))
    assert block.after == "cudnn"
    assert block.seconds[block.before] == 1e-5
    assert block.ratio == pytest.approx(5.0)
    assert block.device == "H100"
    assert result.changed == result.layers
    assert result.seconds_before == pytest.approx(6e-5)
    assert result.seconds_after == pytest.approx(1.2e-5)
    text = str(result)
    assert text.startswith("4 of 4 convolutions run another plan than before")
    assert f"a and 1 more  {block.convolution}" in text
    assert "60.0 us before, 12.0 us now, 5.00 times as fast" in text
    assert stem.before in text
    assert text.endswith(f"saved in {path}")
    assert stem.before.startswith(("direct", "implicit_gemm"))


def test_every_candidate_is_given_to_the_timer_with_the_tensors() -> None:
    seen: list[tuple[RecordedCall, Sequence[str]]] = []

    def timer(call: RecordedCall, names: Sequence[str]) -> list[float]:
        seen.append((call, names))
        return counting(call, names)

    fused_cna.tune(network(), image(), timer=timer, limit=5, progress=False, save=False)
    for call, names in seen:
        assert 2 <= len(names) <= 6
        assert len(set(names)) == len(names)
        assert names[-1] == "cudnn"
        assert call.arguments[0].shape[1] == call.problem["c"]
        legal = [c["name"] for c in planner().candidates(call.problem, "H100") if not c["illegal"]]
        assert set(names[:-1]) <= set(legal)
        assert names[0] == legal[0]


def test_the_plan_in_force_is_timed_even_where_it_is_hopeless(path: Path) -> None:
    x = image(64, 64, 28, 28)
    block = ConvNormAct(64, 64).eval().to(memory_format=torch.channels_last).half()
    (call,) = record(block, x.half().to(memory_format=torch.channels_last), planner())
    target = _tuned.named_target(planner(), "H100")
    plan_file.add(path, target.device, [plan_file.TunedPlan(call.key, "direct 256x1x16", 1.0)])
    result = fused_cna.tune(block, call.x, timer=counting, limit=3, progress=False)
    assert result.layers[0].before == "direct 256x1x16"
    assert result.layers[0].after == fused_cna.explain(block, call.x).candidates[0]["name"]
    assert len(result.layers[0].seconds) == 5


def test_another_device_is_planned_for_by_name(path: Path) -> None:
    fused_cna.tune(network(), image(), timer=counting, device="A100", progress=False)
    ((device, version),) = plan_file.read(path)
    assert device == plan_file.Device("A100", "8.0", 108)
    assert version == fused_cna.__version__
    with pytest.raises(ValueError, match="no device is called 'TPU'"):
        fused_cna.tune(network(), image(), timer=counting, device="TPU", progress=False)


def test_nothing_is_written_where_that_is_not_wanted(path: Path) -> None:
    result = fused_cna.tune(network(), image(), timer=favouring("direct"), save=False, progress=False)
    assert result.path is None
    assert "not saved" in str(result)
    assert list(path.parent.iterdir()) == []
    assert _tuned.plans_for(_tuned.named_target(planner(), "H100").device)


def test_a_file_that_cannot_be_written_is_said_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(plan_file.VARIABLE, str(tmp_path / "file" / "plans.json"))

    def timer(call: RecordedCall, names: Sequence[str]) -> list[float]:
        raise AssertionError("timed")

    with pytest.raises(fused_cna.PlanFileError, match="FUSED_CNA_PLAN_FILE"):
        fused_cna.tune(network(), image(), timer=timer, progress=False)


@pytest.mark.parametrize(
    "times",
    [lambda names: [1.0], lambda names: [0.0] * len(names), lambda names: [math.nan] * len(names)],
    ids=["too few", "zero", "nan"],
)
def test_a_timer_that_answers_nonsense_is_refused(times: Callable[[Sequence[str]], list[float]]) -> None:
    with pytest.raises(ValueError, match="a positive number of seconds for each of the"):
        fused_cna.tune(network(), image(), timer=lambda call, names: times(names), progress=False)


def test_what_was_timed_before_an_error_is_kept(path: Path) -> None:
    calls = itertools.count()

    def timer(call: RecordedCall, names: Sequence[str]) -> list[float]:
        if next(calls) == 2:
            raise WrongResultError("the third is wrong")
        return counting(call, names)

    with pytest.raises(WrongResultError, match="the third is wrong"):
        fused_cna.tune(network(), image(), timer=timer, progress=False)
    (plans,) = plan_file.read(path).values()
    assert len(plans) == 2


def test_what_cannot_be_timed_stays_as_it_is(path: Path) -> None:
    def timer(call: RecordedCall, names: Sequence[str]) -> list[float]:
        if call.names == ["stem"]:
            raise torch.OutOfMemoryError
        return [math.inf] * len(names) if call.names == ["head"] else counting(call, names)

    result = fused_cna.tune(network(), image(), timer=timer, progress=False)
    stem, head = result.layers[0], result.layers[-1]
    assert not stem.changed
    assert not head.changed
    assert stem.ratio == 1.0
    assert "2 could not be timed" in str(result)
    assert len(next(iter(plan_file.read(path).values()))) == 2


def test_a_machine_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"on a GPU, and torch sees none here .*pass timer="):
        fused_cna.tune(network(), image())


def test_a_model_that_is_not_on_the_gpu_is_told_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_extension, "_module", SimpleNamespace(clear_tuned_plans=lambda: None))
    with pytest.raises(RuntimeError, match=r"the model ran on cpu; move it and its inputs with \.cuda\(\)"):
        fused_cna.tune(network(), image())


def test_a_missing_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_reason", "it was not built")
    with pytest.raises(RuntimeError, match="no kernels to time: it was not built"):
        fused_cna.tune(network(), image())


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1, but got 0"):
        fused_cna.tune(network(), image(), timer=counting, limit=0)


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fused_cna.tune(network(), image(), timer=counting)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 4
    assert shown.err.startswith("tuning 1 of 4: 3x3 stride 2, ")
    fused_cna.tune(network(), image(), timer=counting, progress=False)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="draws the bar")
    monkeypatch.setenv("FORCE_COLOR", "1")
    fused_cna.tune(network(), image(), timer=counting)
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.console", None)
    fused_cna.tune(network(), image(), timer=counting)
    assert capsys.readouterr().err.startswith("tuning 1 of 4: ")


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


def checked(run: Callable[[str], Tensor], problem: Problem = CHECKED) -> list[str]:
    eager = ops.operator(*problem.operator_arguments())
    listed = planner_names(problem)
    names = [*listed[:3], *(name for name in listed[3:] if name.startswith("direct")), "cudnn"]
    return check_results(recorded(problem), names, run, eager)


def planner_names(problem: Problem) -> list[str]:
    call = recorded(problem)
    return [c["name"] for c in planner().candidates(call.problem, "H100") if not c["illegal"]]


def test_right_results_pass() -> None:
    names = checked(simulator(CHECKED))
    assert names[-1] == "cudnn"
    assert any(name.startswith("direct") for name in names)
    assert any(name.startswith("implicit_gemm_sm80") for name in names)


def first_pixel_lost(y: Tensor) -> Tensor:
    y[0, :, 0, 0] = 0
    return y


def not_a_number(y: Tensor) -> Tensor:
    y[0, 0, 0, 0] = math.nan
    return y


@pytest.mark.parametrize("kernel", ["direct", "implicit_gemm_sm80"])
@pytest.mark.parametrize("spoil", [first_pixel_lost, not_a_number, torch.zeros_like, torch.neg])
def test_a_wrong_kernel_is_never_chosen(kernel: str, spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(WrongResultError, match=rf"plan '{kernel} .*computed a wrong result for 3x3, "):
        checked(simulator(CHECKED, **{kernel: spoil}))


def test_a_cudnn_route_less_accurate_than_the_kernels_is_left_out() -> None:
    names = checked(simulator(CHECKED, cudnn=lambda y: y * 1.002))
    assert names
    assert "cudnn" not in names


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
    from tests.reference import error_bound

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


@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise_3x3", "odd_channels"])
def test_a_tuned_plan_computes_the_same_in_the_simulator(name: str) -> None:
    problem = integer_problem(shape_named(name), torch.float16, Wanted("relu", residual_order="add_act"))

    def timer(call: RecordedCall, names: Sequence[str]) -> list[float]:
        return [2.0] * (len(names) - 2) + [1.0, 3.0]

    result = fused_cna.tune(
        lambda: ops.operator(*problem.operator_arguments()), (), timer=timer, progress=False, save=False
    )
    (layer,) = result.layers
    assert layer.after in planner_names(problem)
    assert torch.equal(problem.call(simulated, plan=layer.after), problem.call(simulated))


def test_every_shape_of_the_tests_can_be_recorded() -> None:
    for shape in SHAPES:
        problem = integer_problem(shape, torch.float16)
        if math.prod(shape.output_size) == 0:
            continue
        assert recorded(problem).problem["k"] == shape.k


@pytest.mark.gpu
def test_tuning_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    model, x = network().cuda().half(), image().cuda().half()
    with torch.inference_mode():
        expected = model(x)
        result = fused_cna.tune(model, x)
        actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    assert len(result.layers) == 4
    assert result.seconds_after <= result.seconds_before
    in_force = {(p["c"], p["k"], p["has_residual"]): name for p, _, name in _extension.module().tuned_plans()}
    assert len(in_force) == 4
    assert in_force[3, 16, False] == result.layers[0].after
    assert fused_cna.explain(model.stem, x).candidates[0]["name"] == result.layers[0].after
    assert path.exists()


@pytest.mark.gpu
def test_every_plan_can_be_timed_on_a_gpu() -> None:
    needs_gpu()
    problem = random_problem(shape_named("3x3"), torch.float16, Wanted("relu", residual_order="add_act"))
    call = recorded(problem.map(lambda t: (channels_last(t) if t.dim() == 4 else t).cuda()))
    target = _tuned.cuda_target(0)
    names = [*select(planner().candidates(call.problem, dict(target.info)), 24), "cudnn"]
    seconds = _device_timer.DeviceTimer()(call, names)
    assert len(seconds) == len(names)
    assert all(1e-7 < value < 1e-2 or name == "cudnn" for name, value in zip(names, seconds, strict=True))
