"""The job models: what results come to, what is left out, and what is printed, drawn and written."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cli, compare, jobs, layers, model_cases, models, report, terminal
from bench.model_cases import GOALS, planned_cases
from bench.model_plot import plot_models
from bench.model_report import models_summary, print_models
from bench.model_result import ModelResult, ModelsResult, goals_reached
from bench.model_routes import (
    EAGER,
    FROZEN,
    FUSED,
    INDUCTOR_FROZEN,
    EagerChannelsLast,
    routes_for,
)
from bench.setting import Budget
from tests.bench_cases import FakeClock, setting
from tests.bench_model_cases import (
    DropsNorms,
    entry,
    result,
    result_with_goal,
    use_few_routes,
    use_small_networks,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_networks(monkeypatch)


@pytest.fixture
def few_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_routes(monkeypatch)


class TestCompare:
    def test_on_a_cpu_the_reference_is_the_faster_eager_layout(self) -> None:
        made = result(
            entry(EAGER[0], 4.0, 4.0),
            entry(EAGER[1], 6.0, 6.0),
            entry(INDUCTOR_FROZEN, 1.0, 1.0),
            entry(FUSED, 2.0, 2.0, ours=True),
        )
        assert made.references == {"launched": EAGER[0]}
        ratios = {one.route: one.speedups["launched"].median for one in made.entries}
        assert ratios == {EAGER[0]: 1.0, EAGER[1]: pytest.approx(4 / 6), INDUCTOR_FROZEN: 4.0, FUSED: 2.0}
        assert made.images_per_second(FUSED, "launched") == 1.0

    def test_on_a_gpu_it_is_the_fastest_that_is_not_ours(self) -> None:
        made = result(
            entry(EAGER[1], 4.0, launch="graph"),
            entry("torch.compile", 3.0, launch="graph"),
            entry("compile fused_cna", 1.0, ours=True, launch="graph"),
            device="cuda",
        )
        assert made.references == {"graph": "torch.compile"}
        ratio = made.speedup("compile fused_cna", "graph")
        assert ratio is not None
        assert ratio.median == 3.0

    def test_rounds_are_paired(self) -> None:
        made = result(entry(EAGER[1], 1.0, 10.0, 2.0), entry(FUSED, 0.5, 5.0, 1.0, ours=True))
        ratio = made.speedup(FUSED)
        assert ratio is not None
        assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)

    def test_nothing_to_compare_with(self) -> None:
        made = result(entry(FUSED, 2.0, ours=True))
        assert made.references == {}
        assert made.speedup(FUSED) is None


class TestGoals:
    def test_reached(self) -> None:
        outcomes = goals_reached([result_with_goal(goal, 3.0, 3.5, 5.9) for goal in GOALS])
        assert [one.reached for one in outcomes] == [True] * 5
        assert [one.measured for one in outcomes[:3]] == ["2.00x"] * 3
        assert "1.17 (1.17-1.17), of 3 measured" in outcomes[3].measured

    def test_not_reached(self) -> None:
        outcomes = goals_reached([result_with_goal(goal, 5.0, 4.0, 7.0) for goal in GOALS])
        assert [one.reached for one in outcomes] == [False] * 5
        assert "slower on resnet50 n1 fp32 0.80x" in outcomes[3].measured
        assert "slower on resnet50 n1 fp32 0.86x" in outcomes[4].measured

    def test_not_measured(self) -> None:
        elsewhere = result_with_goal(model_cases.Goal("resnet50", 4, 1.5), 3.0, 3.5, 5.0)
        assert [one.reached for one in goals_reached([elsewhere])] == [None, None, None, True, True]
        assert [one.reached for one in goals_reached([])] == [None] * 5

    def test_a_gpu_has_none(self) -> None:
        assert ModelsResult(on_gpu=True).goals == []


class TestRun:
    def run(self, **changes: Any) -> tuple[ModelsResult, list[str]]:
        steps: list[str] = []
        made = setting(networks=("tiny", "absent"), **changes)
        outcome = models.run(made, steps.append)
        return outcome, steps

    def test_measures_what_is_there_and_says_what_is_not(self, tiny: None, few_routes: None) -> None:
        outcome, steps = self.run()
        assert steps == ["tiny n2 fp32"]
        assert [one.name for one in outcome.results] == steps
        assert outcome.left_out == {
            "absent n2 fp32": "no_such_library is not installed here (pip install no_such_library)"
        }
        assert outcome.failures == []

    def test_under_a_budget_compiled_routes_come_last(
        self, tiny: None, few_routes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, steps = self.run(budget=1e9, batches=(1, 2))
        assert steps == [
            "tiny n1 fp32",
            "tiny n2 fp32",
            "tiny n1 fp32 (compiled routes)",
            "tiny n2 fp32 (compiled routes)",
        ]
        clock = FakeClock()
        measure = models.measure

        def takes_ten_seconds(*arguments: Any) -> ModelResult:
            clock.spend(10)
            return measure(*arguments)

        monkeypatch.setattr(models, "measure", takes_ten_seconds)
        outcome, steps = self.run(budget=Budget(25.0, clock=lambda: clock.now), batches=(1, 2))
        assert steps == ["tiny n1 fp32", "tiny n2 fp32", "tiny n1 fp32 (compiled routes)"]
        assert outcome.left_out["tiny n2 fp32 (compiled routes)"] == "the budget of 25 s was spent"
        assert [[one.route for one in made.entries] for made in outcome.results] == [
            [*EAGER, FUSED, INDUCTOR_FROZEN],
            [*EAGER, FUSED],
        ]

    def test_part_of_a_budget_is_kept(self, tiny: None, few_routes: None) -> None:
        outcome = models.run(setting(networks=("tiny",), budget=10.0), [].append, keep=10.0)
        assert outcome.left_out["tiny n2 fp32"] == "the budget of 10 s was spent"

    def test_without_a_budget_a_cpu_compiles_only_goals(
        self, tiny: None, few_routes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outcome = models.run(setting(), [].append)
        assert outcome.results[0].entry(INDUCTOR_FROZEN) is None
        assert "--budget" in outcome.left_out["tiny n2 fp32 (compiled routes)"]
        monkeypatch.setattr(model_cases, "GOALS", (model_cases.Goal("tiny", 2, 1.0),))
        outcome = models.run(setting(), [].append)
        assert outcome.results[0].entry(INDUCTOR_FROZEN) is not None

    def test_what_was_measured_is_not_measured_again(self, tiny: None, few_routes: None) -> None:
        first, _ = self.run()
        steps: list[str] = []
        again = models.run(setting(networks=("tiny",)), steps.append, earlier=first.results)
        assert (steps, again.results, again.resumed) == ([], first.results, 1)
        first.results[0].entries.pop()
        again = models.run(setting(networks=("tiny",)), steps.append, earlier=first.results)
        assert steps == ["tiny n2 fp32"]
        assert len(again.results) == 1
        assert again.results[0].entry(INDUCTOR_FROZEN) is not None

    @pytest.mark.parametrize(
        ("error", "left_out", "broke_off"),
        [
            (torch.OutOfMemoryError("too much"), ["tiny n2 fp32"], []),
            (RuntimeError("gone\nlines"), [], ["tiny n2 fp32: RuntimeError: gone"]),
            (KeyboardInterrupt(), ["tiny n2 fp32"], []),
        ],
    )
    def test_a_case_that_breaks_off(
        self,
        error: BaseException,
        left_out: list[str],
        broke_off: list[str],
        tiny: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def break_off(*_: object) -> None:
            raise error

        monkeypatch.setattr(models, "measure", break_off)
        outcome = models.run(setting(networks=("tiny",)), [].append)
        assert list(outcome.left_out) == left_out
        assert outcome.failures == broke_off


class TestJob:
    def run(
        self, out: Path, monkeypatch: pytest.MonkeyPatch, resume: Path | None = None
    ) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        made = setting(networks=("tiny", "absent"))
        status = jobs.run(made, ("models",), out, [], terminal.make_console(), resume)
        return status, json.loads((out / "models.json").read_text())

    def test_leaves_results_and_plot(
        self,
        tiny: None,
        few_routes: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pytest.importorskip("matplotlib", reason="the plot needs it")
        status, written = self.run(tmp_path, monkeypatch)
        assert status == 0
        assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
        (row,) = written["models"]["rows"]
        assert (row["network"], row["batch"], row["precision"]) == ("tiny", 2, "fp32")
        assert all(route["images_per_second"]["launched"] > 0 for route in row["routes"])
        assert len(written["models"]["goals"]) == 5
        assert list(written["models"]["left_out"]) == ["absent n2 fp32"]
        said = capsys.readouterr().out
        assert "pip install no_such_library" in said
        assert "not measured" in said
        status, again = self.run(tmp_path, monkeypatch, tmp_path / "models.json")
        assert status == 0
        assert again["models"]["rows"] == written["models"]["rows"]
        assert "1 networks were measured in the run" in capsys.readouterr().out

    def test_a_wrong_result_fails_the_run(
        self, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "routes_for", lambda setting: (EagerChannelsLast(), DropsNorms()))
        status, written = self.run(tmp_path, monkeypatch)
        assert status == 1
        assert "wrong result" in written["models"]["failures"][0]

    @pytest.mark.parametrize(
        ("later", "kept"), [((), 0.0), (("models", "overhead"), 30.0), (("pipeline", "overhead"), 6.0)]
    )
    def test_a_part_of_a_budget_is_kept_for_what_comes_later(
        self, later: tuple[str, ...], kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def only_look(*_: object, keep: float, **__: object) -> Any:
            assert keep == pytest.approx(kept)
            raise RuntimeError("enough")

        session = jobs.Session(
            setting(budget=60.0),
            terminal.make_console(),
            tmp_path,
            jobs.Earlier(),
            lambda content: None,
            later,
        )
        for module, run in ((models, jobs.run_models), (layers, jobs.run_layers)):
            monkeypatch.setattr(module, "run", only_look)
            with pytest.raises(RuntimeError, match="enough"):
                run(session)

    def test_without_compiling(self, tiny: None, few_routes: None) -> None:
        made = cli.setting_of(cli.parser().parse_args(["models", "--device", "cpu", "--no-compile"]))
        assert [route.name for route in routes_for(made)] == [*EAGER, FUSED, FROZEN]
        for budget in (None, 1e9):
            steps: list[str] = []
            outcome = models.run(setting(compiled=False, budget=budget, networks=("tiny",)), steps.append)
            assert steps == ["tiny n2 fp32"]
            assert outcome.left_out == {}
            assert [one.route for one in outcome.results[0].entries] == [*EAGER, FUSED]

    def test_an_unknown_network(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["models", "--model", "resnet50,alexnet"])
        assert stopped.value.code == 2
        assert "unknown network 'alexnet' (choose from resnet50, mobilenet_v2" in capsys.readouterr().err

    def test_options(self) -> None:
        made = cli.setting_of(
            cli.parser().parse_args(["models", "--device", "cpu", "--model", "resnet50", "--max-autotune"])
        )
        assert (made.networks, made.max_autotune) == (("resnet50",), True)

    @pytest.mark.parametrize("library", ["torchvision", "timm"])
    def test_needs_no_library_of_networks(self, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else object())
        of_library = [case for case in planned_cases(setting(batches=())) if case.model.library == library]
        assert of_library
        for case in of_library:
            assert f"pip install {library}" in str(model_cases.why_not_installed(case))
        assert jobs.why_skip(jobs.JOBS["models"], setting()) is None


SLOWER = result(
    entry(EAGER[1], 2e-3, 2e-3),
    entry(FUSED, 4e-3, 4e-3, ours=True, fused_calls=2, conv_calls=3, setup_seconds=0.5),
    entry("refuses", refused="no", error=None, notes=["careful"]),
    entry("compile fused_cna", left_out="not there", ours=True, error=None),
)


class TestReport:
    def test_survives_json(self) -> None:
        written = json.loads(json.dumps(SLOWER.as_json()))
        assert json.loads(json.dumps(ModelResult.from_json(written).as_json())) == written

    @pytest.mark.parametrize("rich", [True, False])
    def test_prints_everything(
        self, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if rich and not terminal.HAS_RICH:
            pytest.skip("rich is not installed")
        monkeypatch.setattr(terminal, "HAS_RICH", rich)
        outcome = ModelsResult(False, [SLOWER], left_out={"a": "the budget was spent"})
        print_models(terminal.make_console(), outcome)
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        rows = [line for line in lines if line.startswith("tiny n2 fp32")]
        assert rows == [
            "tiny n2 fp32 reference 0.50 (0.50-0.50) -",
            "tiny n2 fp32 1.0e-07 100.0% 1.0e-07 100.0% -",
            "tiny n2 fp32 16 2 of 3 0.5 -",
        ]
        for line in (
            "left out: a: the budget was spent",
            "left out: tiny n2 fp32 compile fused_cna: not there",
            "not timed: tiny n2 fp32 refuses: no",
            "note: tiny n2 fp32 refuses: careful",
            "images: noise",
        ):
            assert line in lines

    def test_the_summary_has_ratios_and_goals(self) -> None:
        lines = models_summary(ModelsResult(False, [SLOWER]))
        assert lines[:2] == [
            "networks: 1 measured, 0 left out",
            f"  tiny n2 fp32, launched eagerly: {EAGER[1]} 1.00, fused 0.50",
        ]
        assert len(lines) == 7
        assert lines[-1].endswith(": not reached: slower on tiny n2 fp32 0.50x, of 1 measured")

    @pytest.mark.parametrize("on_gpu", [True, False])
    def test_plots(self, on_gpu: bool, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="the plot needs it")
        goal = result_with_goal(GOALS[0], 3.0, 3.5, 5.9)
        path = plot_models(
            tmp_path / "new" / "models.png", ModelsResult(on_gpu, [SLOWER, goal]), "a heading", "note"
        )
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_two_files_are_compared(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        provenance = {
            "device": {"type": "cpu", "name": "a device"},
            "torch": "2.14",
            "sources": "0",
            "seed": 0,
            "fused_cna": {},
            "host": {"threads": 1},
        }
        before, after = tmp_path / "a.json", tmp_path / "b.json"
        faster = result(entry(EAGER[1], 2e-3, 2e-3), entry(FUSED, 1e-3, 1e-3, ours=True))
        for path, made in ((before, SLOWER), (after, faster)):
            report.write_json(
                path, {"provenance": provenance, "models": ModelsResult(False, [made]).as_json()}
            )
        (change,) = compare.compare_files(before, after).changes
        assert (change.name, change.what, change.ratio, change.control) == (
            "tiny n2 fp32 fused",
            "networks",
            4.0,
            1.0,
        )
        compare.print_compared(terminal.make_console(), compare.compare_files(before, after))
        assert "4.00 (4000.0 to 1000.0 us, eager channels_last 1.00)" in capsys.readouterr().out
