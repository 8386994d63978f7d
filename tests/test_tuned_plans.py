"""The table of tuned plans: what explain and the extension make of the file, and what a plan is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_cna
from fused_cna import PlanFileWarning, _extension, _tuned, plan_file
from fused_cna.plan import planner
from fused_cna.plan_file import TunedPlan, problem_key
from tests.test_plan_file import H100, sized, tuned

pytestmark = pytest.mark.filterwarnings("error::fused_cna.PlanFileWarning")


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps its plans."""
    place = tmp_path / "plans.json"
    monkeypatch.setenv(plan_file.VARIABLE, str(place))
    monkeypatch.setattr(plan_file, "_warned", set())
    return place


def test_explain_takes_plans_from_the_file_and_says_so(path: Path) -> None:
    by_estimate = fused_cna.explain(sized(8))
    assert not by_estimate.is_tuned
    plan_file.add(path, H100, [tuned(8, "direct 64x64x32", 12.5)])
    explanation = fused_cna.explain(sized(8), device="H100")
    assert explanation.is_tuned
    assert explanation.tuned_us == 12.5
    assert str(explanation).startswith("direct 64x64x32 on H100, tuned: measured 12.5 us, estimated ")
    names = [c["name"] for c in explanation.candidates]
    assert sorted(names) == sorted(c["name"] for c in by_estimate.candidates)
    assert not fused_cna.explain(sized(8), device="A100").is_tuned
    assert not fused_cna.explain(sized(9)).is_tuned
    path.unlink()
    assert fused_cna.explain(sized(8)).candidates == by_estimate.candidates


def test_explain_says_which_layers_run_on_cudnn(path: Path) -> None:
    plan_file.add(path, H100, [tuned(8, "cudnn", 12.5)])
    explanation = fused_cna.explain(sized(8))
    assert explanation.kernel == "cudnn"
    assert str(explanation).startswith("cudnn on H100, tuned: measured 12.5 us\n")
    assert "norm folded per call" in str(explanation)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"channels_last": False},
        {"stride": 2},
        {"padding": (1, 1, 1, 2)},
        {"act": "silu"},
        {"norm": False},
        {"residual": "add_act"},
        {"groups": 2},
    ],
    ids=str,
)
def test_a_plan_is_for_its_problem_alone(path: Path, change: dict[str, Any]) -> None:
    plan_file.add(path, H100, [tuned(8, "direct 64x64x32")])
    sizes = {"n": 8, "c": 64, "h": 56, "w": 56, "k": 64, "r": 3, "s": 3, "padding": 1}
    assert fused_cna.explain(fused_cna.ConvProblem(**sizes)).is_tuned
    assert not fused_cna.explain(fused_cna.ConvProblem(**(sizes | change))).is_tuned


@pytest.mark.parametrize(
    "name", ["winograd", "direct 1x2x3", "direct", "implicit_gemm_sm80 64x64x32 split 1"]
)
def test_a_plan_that_is_none_any_more_is_ignored_and_reported(path: Path, name: str) -> None:
    plan_file.add(path, H100, [tuned(8, name)])
    explanation = fused_cna.explain(sized(8))
    assert not explanation.is_tuned
    assert f"a tuned plan is ignored: {name}: there is no plan" in str(explanation)


def test_problems_of_another_shape_are_refused(path: Path) -> None:
    known = dict(tuned(8).problem)
    odd = [{k: v for k, v in known.items() if k != "groups"}, known | {"colour": 1}, known | {"n": "many"}]
    device = planner().device("H100")
    messages = ("has no field 'groups'", "unknown field 'colour'", "n='many'")
    for problem, message in zip(odd, messages, strict=True):
        with pytest.raises(ValueError, match=message):
            planner().set_tuned_plan(problem, device, "direct 64x64x32")
    target = _tuned.named_target(planner(), "H100")
    why = _tuned.set_plan(planner(), target, TunedPlan(problem_key(known | {"colour": 1}), "cudnn", 1.0))
    assert "unknown field 'colour'" in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups=0, at least 1"),
        ({"stride_h": 0}, "stride_h=0, at least 1"),
        ({"groups": 3}, "groups=3, which must divide c="),
        ({"r": 1000}, "an output height=-"),
    ],
)
def test_problems_that_are_no_convolution_are_refused(change: dict[str, Any], message: str) -> None:
    """The plan divides by such numbers, and a file may hold anything."""
    problem = dict(tuned(8).problem) | change
    with pytest.raises(ValueError, match=message):
        planner().set_tuned_plan(problem, planner().device("H100"), "direct 64x64x32")
    device = planner().device("H100") | {"multiprocessors": 0}
    with pytest.raises(ValueError, match="multiprocessors=0"):
        planner().set_tuned_plan(dict(tuned(8).problem), device, "direct 64x64x32")


@pytest.fixture
def compiled() -> Iterator[Any]:
    """The extension, whose tuned plans are those of this test alone."""
    if not _extension.is_available():
        pytest.skip(f"needs the extension: {_extension.unavailable_reason()}")
    extension = _extension.module()
    _tuned.forget()
    yield extension
    _tuned.forget()
    extension.set_plan_loader(_tuned.load)


def as_if_there(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every CUDA device is an H100 from now on; the indices asked for."""
    asked: list[int] = []

    def target(index: int) -> _tuned.Target:
        asked.append(index)
        return _tuned.Target(H100, planner().device("H100"))

    monkeypatch.setattr(_tuned, "cuda_target", target)
    return asked


def test_the_extension_reads_the_file_once_per_device(
    path: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = as_if_there(monkeypatch)
    plan_file.add(path, H100, [tuned(8), tuned(9, "cudnn")])
    for _ in range(3):
        compiled._load_plans_once(101)
    assert asked == [101]
    found = {(problem["n"], name) for problem, device, name in compiled.tuned_plans()}
    assert found == {(8, "direct 64x64x32"), (9, "cudnn")}
    assert all(device == planner().device("H100") for _, device, _ in compiled.tuned_plans())


def test_the_extension_ignores_bad_plans_with_one_warning(
    path: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_there(monkeypatch)
    plan_file.add(path, H100, [tuned(1, "winograd"), tuned(2, "direct"), tuned(3)])
    with pytest.warns(PlanFileWarning, match=r"2 tuned plans for NVIDIA H100 .* are ignored"):
        compiled._load_plans_once(102)
    compiled._load_plans_once(103)
    assert [problem["n"] for problem, _, _ in compiled.tuned_plans()] == [3]


def test_a_broken_file_does_not_stop_the_extension(
    path: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_there(monkeypatch)
    path.write_text("broken")
    with pytest.warns(PlanFileWarning, match="damaged"):
        compiled._load_plans_once(104)
    assert compiled.tuned_plans() == []


def test_an_error_while_loading_reaches_the_caller_and_is_tried_again(compiled: Any) -> None:
    def no_plans(device_index: int) -> None:
        raise ValueError("no plans today")

    compiled.set_plan_loader(no_plans)
    for _ in range(2):
        with pytest.raises(ValueError, match="no plans today"):
            compiled._load_plans_once(105)


def test_a_forced_plan_within_another_gives_way_to_it_again(compiled: Any) -> None:
    with fused_cna.forced_plan("direct"):
        with fused_cna.forced_plan("implicit_gemm_sm80"):
            assert compiled.force_plan("implicit_gemm_sm80") == "implicit_gemm_sm80"
        assert compiled.force_plan("direct") == "direct"
    assert compiled.force_plan("") == ""


def test_plans_set_in_this_process_come_first_and_are_forgotten(path: Path, compiled: Any) -> None:
    target = _tuned.named_target(planner(), "H100")
    plan_file.add(path, H100, [tuned(8, "direct 64x64x32")])
    _tuned.use(target, [tuned(8, "direct 128x8x32")])
    assert fused_cna.explain(sized(8)).candidates[0]["name"] == "direct 128x8x32"
    assert [name for _, _, name in compiled.tuned_plans()] == ["direct 128x8x32"]
    _tuned.forget()
    assert fused_cna.explain(sized(8)).candidates[0]["name"] == "direct 64x64x32"
    assert compiled.tuned_plans() == []


def test_a_choice_is_remembered_until_the_tuned_plans_change() -> None:
    module, device = planner(), planner().device("H100")
    problem = module.problem(sized(31).question())
    module.clear_tuned_plans()
    estimated = module.chosen(problem, device)
    assert not estimated["tuned"]
    assert module.set_tuned_plan(problem, device, "direct 256x1x16") == ""
    assert module.chosen(problem, device)["name"] == "direct 256x1x16"
    assert module.set_tuned_plan(problem, device, "direct 128x8x32") == ""
    assert module.chosen(problem, device)["name"] == "direct 128x8x32"
    assert module.chosen(problem, device)["tuned"]
    assert module.chosen(problem, module.device("H200"))["name"] != "direct 128x8x32"
    assert module.tuned_plans() == [(problem, device, "direct 128x8x32")]
    module.clear_tuned_plans()
    assert module.chosen(problem, device) == estimated
