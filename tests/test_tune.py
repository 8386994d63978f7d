"""Tuning: what is timed, what wins, what is kept and what is said."""

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
from torch import nn

import fused_cna
from fused_cna import ConvNormAct, _extension, _tuned, ops, plan_file
from fused_cna._device_timer import WrongResultError
from fused_cna._recording import RecordedCall, record
from fused_cna.plan import planner
from fused_cna.tuning import select
from tests.conftest import needs_gpu
from tests.reference import Wanted, integer_problem
from tests.shapes import shape_named
from tests.simt import conv_norm_act as simulated
from tests.test_device_timer import planner_names
from tests.test_recording import image, network

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


def counting(call: RecordedCall, names: Sequence[str]) -> list[float]:
    """A timer for which every candidate takes longer than the one before."""
    return [1e-6 * (i + 1) for i in range(len(names))]


def favouring(kernel: str) -> Timer:
    """A timer for which every plan takes 10 us, but those of one kernel 2 us."""
    return lambda call, names: [2e-6 if name.startswith(kernel) else 1e-5 for name in names]


def test_nothing_to_tune_is_an_error_that_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"training mode; call model\.eval\(\) first"):
        fused_cna.tune(ConvNormAct(3, 4), image(), timer=counting)
    with pytest.raises(RuntimeError, match=r"has no fused_cna\.ConvNormAct in eval mode"):
        fused_cna.tune(nn.Conv2d(3, 4, 3).eval(), image(), timer=counting)


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
            raise RuntimeError("the device is lost")
        return counting(call, names)

    with pytest.raises(RuntimeError, match="the device is lost"):
        fused_cna.tune(network(), image(), timer=timer, progress=False)
    (plans,) = plan_file.read(path).values()
    assert len(plans) == 2


def test_a_wrong_plan_is_left_out_loudly_and_the_other_layers_are_tuned(path: Path) -> None:
    def timer(call: RecordedCall, names: Sequence[str]) -> list[float | Exception]:
        wrong = [WrongResultError(f"{names[0]} is wrong")] if call.names == ["stem"] else [9.0]
        return [*wrong, *counting(call, names[1:-1]), RuntimeError("no engine\nfor this")]

    with pytest.warns(RuntimeWarning, match=" is wrong$") as warned:
        result = fused_cna.tune(network(), image(), timer=timer, progress=False)
    assert [Path(one.filename) for one in warned] == [Path(__file__)]
    stem, *others = result.layers
    assert stem.before in stem.left_out
    assert stem.seconds[stem.before] == math.inf
    assert all(layer.changed and "cudnn" in layer.left_out for layer in result.layers)
    assert f"WRONG RESULTS: 1 plans were left out\n  {stem.before} is wrong" in str(result)
    assert f"cudnn could not be timed {len(result.layers)} times, first because: no engine\n" in f"{result}\n"
    assert all(set(layer.seconds) > {layer.after, layer.before, "cudnn"} for layer in others)
    assert len(next(iter(plan_file.read(path).values()))) == len(result.layers)


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
    monkeypatch.setattr(
        _extension, "_module", SimpleNamespace(clear_tuned_plans=lambda: None, arrange=lambda *call: None)
    )
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
