"""The job models: which networks and routes, what counts as wrong, what it comes to, and what is left out."""

import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import cli, compare, jobs, model_cases, models, report, terminal
from bench.model_cases import GOALS, MODELS, Case, Images, Model, images_here, planned_cases
from bench.model_plot import plot_models
from bench.model_report import print_models
from bench.model_result import ModelEntry, ModelResult, ModelsResult, goals_reached, judge
from bench.model_routes import (
    EAGER,
    FROZEN,
    FUSED,
    INDUCTOR_FROZEN,
    Call,
    Compiled,
    CompiledFused,
    EagerChannelsLast,
    EagerNchw,
    Fused,
    FusedFrozen,
    ModelRoute,
    routes_for,
)
from bench.setting import Budget
from bench.timing import CapturedCalls, Work
from tests.bench_cases import FakeClock, setting

GPU = torch.device("cuda", 0)
NOISE = Images([torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))], "noise")
TINY = Case("tiny", 2, "fp32")


class Tiny(nn.Module):
    """A residual block and a classifier, which FX can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.branch(x) + x).mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small networks in place of all, the second of a library that is not there."""
    small = {
        "tiny": Model("small", "torch", Tiny, size_on_cpu=16),
        "absent": Model("missing", "no_such_library", Tiny),
    }
    monkeypatch.setattr(model_cases, "MODELS", small)


@pytest.fixture
def few_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inductor, whose compiler takes seconds."""
    routes = (EagerNchw(), EagerChannelsLast(), Fused(), Compiled(INDUCTOR_FROZEN, "cpu", backend="eager"))
    monkeypatch.setattr(models, "routes_for", lambda setting: routes)


class DropsNorms(ModelRoute):
    """What a fuser that forgets the norms would make."""

    name = FUSED
    ours = True

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        broken = Tiny().eval().requires_grad_(False)
        broken.load_state_dict(network.state_dict())
        broken.branch[1] = nn.Identity()
        return broken


class Refuses(ModelRoute):
    name = "refuses"

    def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
        warnings.warn("careful\nwith this", stacklevel=1)
        raise AttributeError("no such thing\nand more")


def entry(
    route: str, *seconds: float, ours: bool = False, launch: str = "launched", **changes: Any
) -> ModelEntry:
    made = ModelEntry(route, "channels_last", ours, samples={launch: list(seconds)} if seconds else {})
    made = replace(made, **{"error": 1e-7, "agreement": 1.0, **changes})
    made.summarize()
    return made


def result(*entries: ModelEntry, case: Case = TINY, device: str = "cpu") -> ModelResult:
    made = ModelResult(case, 16, "noise", list(entries), failure=judge(entries, torch.float32))
    models.compare(made, torch.device(device))
    return made


def result_with_goal(goal: model_cases.Goal, frozen: float, inductor: float, fused: float) -> ModelResult:
    """Eager takes 10 s in the slower layout and 6 in the faster one; the others what is given."""
    return result(
        entry(EAGER[0], 10.0, 10.0),
        entry(EAGER[1], 6.0, 6.0),
        entry(FUSED, fused, fused, ours=True),
        entry(FROZEN, frozen, frozen, ours=True),
        entry(INDUCTOR_FROZEN, inductor, inductor),
        case=Case(goal.network, goal.batch, "fp32"),
    )


class TestCases:
    def test_a_cpu_begins_with_the_goals(self) -> None:
        planned = [(one.network, one.batch) for one in planned_cases(setting(batches=()))]
        assert planned[:3] == [(goal.network, goal.batch) for goal in GOALS]
        assert planned[3 : len(MODELS)] == [(name, 1) for name in list(MODELS)[3:]]
        assert planned[len(MODELS) :] == [("resnet50", 8), ("mobilenet_v2", 1), ("efficientnet_b0", 1)]

    def test_a_gpu_takes_every_network_at_both_batches(self) -> None:
        planned = [(one.network, one.batch) for one in planned_cases(setting(batches=(), device=GPU))]
        assert planned == [(name, batch) for batch in (32, 1) for name in MODELS]

    def test_what_is_asked_for(self) -> None:
        asked = setting(batches=(4, 2), networks=("densenet121", "resnet50"))
        assert [one.name for one in planned_cases(asked)] == [
            "densenet121 n4 fp32",
            "resnet50 n4 fp32",
            "densenet121 n2 fp32",
            "resnet50 n2 fp32",
        ]

    def test_norms_are_calibrated_and_all_their_vectors_matter(self, tiny: None) -> None:
        network = model_cases.build(TINY, NOISE, setting())
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 2
        for norm in norms:
            for vector, untouched in (
                (norm.weight, 1),
                (norm.bias, 0),
                (norm.running_mean, 0),
                (norm.running_var, 1),
            ):
                assert vector is not None
                assert bool((vector - untouched).abs().max() > 0.01)
        assert not network.training
        again = model_cases.build(TINY, NOISE, setting())
        assert all(
            torch.equal(one, other)
            for one, other in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize(("batch", "sets"), [(1, 4), (2, 2), (3, 2), (8, 2)])
    def test_at_least_four_different_images(self, batch: int, sets: int, tiny: None) -> None:
        made = model_cases.input_sets_of(replace(TINY, batch=batch), NOISE, setting())
        assert [tuple(x.shape) for (x,) in made] == [(batch, 3, 16, 16)] * sets
        assert len({float(image.sum()) for (x,) in made for image in x}) == batch * sets

    def test_noise_where_there_are_no_photographs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        images = images_here(seed=0)
        assert "pip install scikit-learn" in images.source
        assert [tuple(picture.shape) for picture in images.pictures] == [(1, 3, 427, 640)] * 2
        assert min(float(p.min()) for p in images.pictures) >= 0
        assert max(float(p.max()) for p in images.pictures) <= 1
        assert not torch.equal(*images.pictures)


class TestNetworks:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_network_fuses_and_is_right(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = MODELS[name]
        pytest.importorskip(model.library, reason=f"{name} is a network of {model.library}")
        monkeypatch.setitem(MODELS, name, replace(model, size_on_cpu=64))
        monkeypatch.setattr(model_cases, "CALIBRATION_BATCHES", 1)
        monkeypatch.setattr(models, "_time", lambda *_: None)
        made = models.measure(
            Case(name, 2, "fp32"), (EagerChannelsLast(), Fused(), FusedFrozen()), NOISE, setting()
        )
        assert made.failure is None
        for one in made.entries:
            assert one.error is not None
            assert 0 < one.error < 1e-3
            assert one.agreement is not None
            assert one.agreement > 0.99
        fused = made.entry(FUSED)
        assert fused is not None
        assert fused.conv_calls is not None
        assert fused.fused_calls is not None
        assert 0 < fused.fused_calls <= fused.conv_calls


class TestRoutes:
    def test_of_a_cpu(self) -> None:
        names = [route.name for route in routes_for(setting(max_autotune=True))]
        assert names == [*EAGER, FUSED, FROZEN, INDUCTOR_FROZEN, "compile fused_cna"]

    def test_of_a_gpu(self) -> None:
        names = [route.name for route in routes_for(setting(device=GPU))]
        assert names == [*EAGER, FUSED, "torch.compile", "compile fused_cna"]
        tuned = [route.name for route in routes_for(setting(device=GPU, max_autotune=True))]
        assert tuned == [*names, "max-autotune"]

    def test_all_routes_give_the_same_answers(self, tiny: None, few_routes: None) -> None:
        made = models.measure(TINY, models.routes_for(setting()), NOISE, setting())
        assert made.failure is None
        assert [one.route for one in made.entries] == [*EAGER, FUSED, INDUCTOR_FROZEN]
        assert {one.memory_format for one in made.entries[1:]} == {"channels_last"}
        for one in made.entries:
            assert one.refused is None
            assert 0 < (one.error or 0) < 1e-5
            assert one.agreement == 1.0
            assert one.seconds["launched"].count == 3
            assert one.speedups["launched"].count == 3
        fused = made.entry(FUSED)
        assert fused is not None
        assert (fused.fused_calls, fused.conv_calls) == (2, 2)
        assert made.references["launched"] in EAGER

    def test_the_backend_is_taken_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bench.model_routes.BACKEND_MODULE", "fused_cna.no_such_module")
        made = models._prepare(CompiledFused(), TINY, Tiny(), [(torch.ones(1, 3, 16, 16),)], [])
        assert made[1] == {}
        assert "has no fused_cna.no_such_module" in str(made[0].left_out)
        assert judge([made[0]], torch.float32) is None

    def test_a_route_that_raises_leaves_the_others(self, tiny: None) -> None:
        made = models.measure(TINY, (EagerChannelsLast(), Refuses()), NOISE, setting())
        refused = made.entry("refuses")
        assert refused is not None
        assert refused.refused == "AttributeError: no such thing"
        assert refused.notes == ["careful"]
        assert made.failure is None
        assert made.speedup(EAGER[1]) is not None

    def test_a_result_that_is_not_written_whole_is_wrong(self, tiny: None) -> None:
        class Reuses(EagerChannelsLast):
            name, ours = "reuses", True

            def prepare(self, network: nn.Module, model: Model, x: Tensor) -> Call:
                kept: list[Tensor] = []

                def call(x: Tensor) -> Tensor:
                    if not kept:
                        kept.append(network(x))
                    return kept[0]

                return call

        made = models.measure(TINY, (EagerChannelsLast(), Reuses()), NOISE, setting())
        assert "reuses: wrong result" in str(made.failure)


class FakeGraph:
    """Runs its calls when it is replayed, as a CUDA graph does."""

    def __init__(self, output: Tensor, replayed: Tensor) -> None:
        self.output, self.replayed = output, replayed

    def replay(self) -> None:
        self.output.copy_(self.replayed)


class TestCapture:
    def capture(
        self, monkeypatch: pytest.MonkeyPatch, replayed: Tensor
    ) -> tuple[ModelEntry, dict[str, Work]]:
        output = torch.ones(1, 4)
        graph: Any = FakeGraph(output, replayed)
        calls = CapturedCalls(graph, output, Work(graph.replay, 2))
        monkeypatch.setattr(models, "captured", lambda call, sets: calls)
        made = entry(FUSED, error=1e-9)
        return made, models._capture(made, lambda x: x, [], torch.ones(1, 4).double())

    def test_what_a_graph_writes_is_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, works = self.capture(monkeypatch, torch.ones(1, 4))
        assert (made.error, works["graph"].calls) == (1e-9, 2)
        made, _ = self.capture(monkeypatch, torch.tensor([[1.0, 1.0, 1.0, 3.0]]))
        assert made.error == 1.0

    def test_what_cannot_be_captured_is_timed_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(models, "captured", refuse)
        made = entry(FUSED)
        assert models._capture(made, lambda x: x, [], torch.ones(1)) == {}
        assert made.no_graph == "RuntimeError: operation not permitted when stream is capturing"
        assert made.refused is None


class TestJudge:
    def test_a_dropped_norm_is_a_failure(self, tiny: None) -> None:
        made = models.measure(TINY, (EagerChannelsLast(), DropsNorms()), NOISE, setting())
        assert "fused: wrong result: relative error" in str(made.failure)
        assert made.speedup(FUSED) is None
        assert made.images_per_second(FUSED, "launched") is None

    def test_a_wrong_rival_is_not_timed_but_no_failure(self) -> None:
        rival = entry(INDUCTOR_FROZEN, 1.0, error=1.0)
        assert judge([entry(EAGER[1], 2.0), rival], torch.float32) is None
        assert "wrong result" in str(rival.refused)

    def test_ours_that_did_not_run_is_a_failure(self) -> None:
        broken = entry(FUSED, ours=True, error=None, refused="FusionError: no")
        assert judge([entry(EAGER[1], 2.0), broken], torch.float32) == "fused did not run: FusionError: no"

    def test_only_ours_has_to_run_in_a_cuda_graph(self) -> None:
        rival = entry("torch.compile", 1.0, no_graph="RuntimeError: no")
        assert judge([rival], torch.float32) is None
        ours = entry(FUSED, 1.0, ours=True, no_graph="RuntimeError: no")
        assert judge([ours], torch.float32) == "fused was not captured in a CUDA graph: RuntimeError: no"

    def test_not_finite_anywhere(self) -> None:
        whole = torch.ones(9, 4)
        assert models._error(whole, whole[models.checked_images(9)].double()) == 0
        (unchecked,) = set(range(9)) - set(models.checked_images(9))
        whole[unchecked, 0] = torch.nan
        assert models._error(whole, torch.ones(8, 4).double()) == torch.inf

    def test_agreement_is_of_the_classes(self) -> None:
        expected = torch.tensor([[1.0, 2.0, 9.0], [2.0, 1.0, 9.0]])
        output = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
        assert models._agreement([output], [expected], classes=2) == 0.5
        assert models._agreement([output], [expected], classes=None) == 0.0
        pixels = torch.zeros(1, 3, 2, 2)
        other = pixels.clone()
        other[0, 1, 0, 0] = 1
        assert models._agreement([other], [pixels], classes=None) == 0.75


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
            "tiny n1 fp32, compiled",
            "tiny n2 fp32, compiled",
        ]
        clock = FakeClock()
        measure = models.measure

        def takes_ten_seconds(*arguments: Any) -> ModelResult:
            clock.spend(10)
            return measure(*arguments)

        monkeypatch.setattr(models, "measure", takes_ten_seconds)
        outcome, steps = self.run(budget=Budget(25.0, clock=lambda: clock.now), batches=(1, 2))
        assert steps == ["tiny n1 fp32", "tiny n2 fp32", "tiny n1 fp32, compiled"]
        assert outcome.left_out["tiny n2 fp32, compiled"] == "the budget was spent"
        assert [[one.route for one in made.entries] for made in outcome.results] == [
            [*EAGER, FUSED, INDUCTOR_FROZEN],
            [*EAGER, FUSED],
        ]

    def test_part_of_a_budget_is_kept(self, tiny: None, few_routes: None) -> None:
        outcome = models.run(setting(networks=("tiny",), budget=10.0), [].append, keep=10.0)
        assert outcome.left_out["tiny n2 fp32"] == "the budget was spent"

    def test_without_a_budget_a_cpu_compiles_only_goals(
        self, tiny: None, few_routes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outcome = models.run(setting(), [].append)
        assert outcome.results[0].entry(INDUCTOR_FROZEN) is None
        assert "--budget" in outcome.left_out["tiny n2 fp32, compiled"]
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
        ],
    )
    def test_a_case_that_breaks_off(
        self,
        error: Exception,
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
        return status, json.loads((out / "results.json").read_text())

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
        status, again = self.run(tmp_path, monkeypatch, tmp_path / "results.json")
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

    def test_half_of_a_budget_is_kept_for_layers(
        self, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept: list[float] = []

        def only_look(*_: object, keep: float, **__: object) -> ModelsResult:
            kept.append(keep)
            return ModelsResult(on_gpu=False)

        monkeypatch.setattr(models, "run", only_look)
        session = jobs.Session(
            setting(budget=60.0), terminal.make_console(), tmp_path, jobs.Earlier(), lambda content: None
        )
        jobs.run_models(session)
        jobs.run_models(replace(session, later=("layers", "overhead")))
        assert kept == [0.0, 30.0]

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
            "tiny n2 fp32 1000 500 -",
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
        (never,) = [line for line in lines if "never slower" in line]
        assert "not reached: slower on tiny n2 fp32 0.50x" in never

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
