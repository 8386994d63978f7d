"""The bench from its command line to the files that it leaves, on tiny inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import __main__ as cli
from bench import cases, first_call, jobs, measure, networks, routes
from bench.compare import compare_files
from bench.measure import Budget, Run
from bench.networks import Case, Model
from bench.result import Outcome, Record, write_json
from bench.routes import BASELINE, EAGER, FROZEN, FUSED, LAYER_ROUTES, Route
from fused_cna import ConvNormAct, _extension, ops
from tests.bench_cases import CPU, FakeClock, entry, layer, record, setting

ROOT = Path(__file__).resolve().parents[1]
SMALL = (layer(h=6, w=6), layer(residual="add_act", cout=8))
BY_NAME = {route.name: route for route in LAYER_ROUTES}
H200 = ROOT / "bench" / "results" / "h200-2026-11-26"


class Tiny(nn.Module):
    """A residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.branch(x) + x).mean((2, 3)))


class TinyModel(Model):
    def why_not(self) -> str | None:
        return "it is not installed here" if self.library == "no" else None

    def build(self) -> nn.Module:
        return super().build() if self.library == "torchvision" else Tiny()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small layers and two small networks, of which one is of a library that is not there."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    models = {
        name: TinyModel(name, "", library, 16) for name, library in (("tiny", "torch"), ("absent", "no"))
    }
    models["mobilenet_v2"] = TinyModel("mobilenet_v2", "", size=32, modules=True)
    noise = torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(networks, "photographs", lambda: [noise])
    monkeypatch.setattr(networks, "MODELS", models)
    monkeypatch.setattr(cli, "MODELS", models)
    monkeypatch.setattr(networks, "TELLING", {"tiny": 1})
    monkeypatch.setattr(cases, "layers_of", lambda suite: SMALL)
    ceilings = jobs.measure_ceilings
    monkeypatch.setattr(jobs, "measure_ceilings", lambda *given: ceilings(*given, small=True))
    monkeypatch.setattr(measure, "ASSUMED_CPU_CACHE", 1 << 12)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)


def bench(out: Path, *arguments: str, name: str = "") -> tuple[int, dict[str, Any]]:
    status = cli.main([*arguments, "--device", "cpu", "--out", str(out)])
    return status, json.loads((out / f"{name or arguments[0]}.json").read_text())


class TestJobs:
    def test_all_of_them(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status = cli.main(["--device", "cpu", "--out", str(tmp_path), "--suite", "quick,networks"])
        written = json.loads((tmp_path / "results.json").read_text())
        assert status == 0
        assert {"schema", "provenance", "kernels", "fused_path", "models", "layers", "overhead"} <= set(
            written
        )
        assert written["skipped"] == {}
        assert [row["name"] for row in written["models"]["rows"]] == ["tiny n1 fp32"]
        assert [row["name"] for row in written["layers"]["rows"]] == [f"fp32 n1 {one.name}" for one in SMALL]
        said = capsys.readouterr().out
        assert (
            said.index("time of eager / time of the route") < said.index("by suite") < said.index("summary")
        )
        plots = {path.name for path in tmp_path.glob("*.png")}
        assert plots == {"models.png", "layers.png", "suites.png", "roofline.png"}

    def test_layers(self, tmp_path: Path) -> None:
        status, written = bench(
            tmp_path, "layers", "--suite", "quick", "--dtype", "fp32,bf16", "--batch", "1,2"
        )
        found = written["layers"]
        assert (status, len(found["rows"]), len(found["groups"])) == (0, 8, 4)
        assert set(found["ceilings"]) == {"fp32", "bf16"}
        for row in found["rows"]:
            assert {one["route"] for one in row["routes"]} == {FUSED, BASELINE}
            assert {one["memory_format"] for one in row["routes"]} == {"channels_last", "contiguous_format"}
            for one in row["routes"]:
                assert one["seconds"]["launched"]["count"] >= 3
                assert 0 < one["error"] < (1e-5 if row["precision"] == "fp32" else 1e-2)
                assert one["first_call_seconds"] > 0
            assert row["comparisons"]["launched"]["rival"] == BASELINE
            assert (row["facts"]["plan"] is None) == bool(row["facts"]["why_no_plan"])
            assert row["facts"]["rotation"]["sets"] >= 2
        provenance = written["provenance"]
        assert provenance["command"][:4] == ["python", "-m", "bench", "layers"]
        assert provenance["torch"] == torch.__version__
        assert provenance["device"]["type"] == "cpu"

    def test_networks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, written = bench(tmp_path, "models", "--no-compile", "--batch", "2")
        tiny, mobile = written["models"]["rows"]
        assert status == 0
        assert written["models"]["left_out"] == {"absent n2 fp32": "it is not installed here"}
        assert [one["route"] for one in tiny["routes"]] == [*EAGER, FUSED, FROZEN]
        fused = {one["route"]: one for one in mobile["routes"]}
        assert (fused[FUSED]["fused_calls"], fused[FUSED]["conv_calls"]) == (52, 52)
        replaced = fused["ConvNormAct modules"]
        assert (replaced["fused_calls"], replaced["conv_calls"], replaced["agreement"]) == (35, 52, 1.0)
        assert all(one["speedups"]["launched"]["median"] > 0 for one in mobile["routes"])
        assert mobile["comparisons"]["launched"]["rival"] in EAGER
        assert "it is not installed here" in capsys.readouterr().out

    def test_the_pipeline_swaps_modules(self) -> None:
        made = cli.setting_of(cli.parser().parse_args(["pipeline", "--device", "cpu"]))
        assert (made.networks, made.batches, made.compiled) == (("mobilenet_v2",), (4,), False)
        case = Case(networks.MODELS["mobilenet_v2"], 1, "fp32")
        network = networks.build_network(case, networks.photographs(), CPU, 0)
        swapped = routes.MODULES.prepare(network, torch.zeros(1))
        assert sum(isinstance(module, ConvNormAct) for module in swapped.modules()) == 35
        assert not any(isinstance(module, ConvNormAct) for module in network.modules())

    def test_overhead(self, tmp_path: Path) -> None:
        before = ops.operator, ops.operator_everywhere
        status, written = bench(tmp_path, "overhead")
        assert (status, (ops.operator, ops.operator_everywhere)) == (0, before)
        (row,) = written["overhead"]["rows"]
        assert [one["route"] for one in row["routes"]] == [FUSED, "three modules", "hand-written module"]
        assert all(one["seconds"]["launched"]["median"] > 0 for one in row["routes"])
        parts = written["overhead"]["parts"]
        if _extension.is_available():
            assert list(parts["seconds"]) == ["inference_mode", "no_grad"]
            assert parts["seconds"]["no_grad"]["plan"]["median"] > 0
        else:
            assert parts["why_not"]

    def test_first_calls_are_made_by_turns_as_far_as_the_budget_goes(self) -> None:
        clock, started = FakeClock(), list[str]()

        def start(request: dict[str, Any]) -> dict[str, Any]:
            clock.spend(1.0)
            started.append(request["route"])
            if request["route"] == "fused":
                raise RuntimeError("it raised")
            return {"seconds": dict.fromkeys(first_call.STEPS, 1.0), "recompiled": True}

        outcome = Outcome()
        budget = Budget(4.5, clock=lambda: clock.now)
        first_call.run(Run(setting(budget=budget, networks=("tiny",)), outcome, [].append), start)
        assert started == ["eager", "fused", "compiled", "eager", "eager"]
        assert outcome.failures == ["tiny: it raised"]
        by_route = {row["route"]: row for row in outcome.extra["results"]}
        assert by_route["eager"]["seconds"]["first call"]["count"] == 3
        assert by_route["fused"]["failure"] == "it raised"
        clock.spend(100.0)
        first_call.run(Run(setting(budget=budget, networks=("tiny",)), outcome, [].append), start)
        assert len(outcome.left_out) == 3

    @pytest.mark.slow
    def test_a_first_call_in_a_fresh_process(self) -> None:
        request = {"network": "mobilenet_v2", "route": "fused", "device": "cpu", "precision": "fp32"}
        answer = first_call.start_process(request | {"batch": 1, "sizes": (32, 64), "seed": 0})
        assert set(answer["seconds"]) == set(first_call.STEPS)
        assert not answer["recompiled"]
        with pytest.raises(RuntimeError, match="KeyError"):
            first_call.start_process(request | {"network": "no such"})


class TestFailures:
    def test_a_wrong_route_of_ours_fails_and_is_not_timed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def wrong(sets: routes.Sets) -> list[Callable[[], Tensor]]:
            return [
                lambda call=call: call().index_fill_(1, torch.tensor([0]), 1)
                for call in BY_NAME[FUSED].prepare(sets)
            ]

        def refusing(sets: routes.Sets) -> list[Callable[[], Tensor]]:
            raise ValueError("no engine\nand more")

        made = (Route(FUSED, wrong, ours=True), BY_NAME[BASELINE], Route("refusing", refusing))
        monkeypatch.setattr(routes, "LAYER_ROUTES", made)
        status, written = bench(tmp_path, "layers")
        assert status == 1
        assert len(written["layers"]["failures"]) == 2
        for row in written["layers"]["rows"]:
            assert row["comparisons"] == {}
            by_name = {one["route"]: one for one in row["routes"]}
            assert "wrong result" in by_name[FUSED]["refused"]
            assert by_name[FUSED]["seconds"] == {}
            assert by_name["refusing"]["refused"] == "ValueError: no engine"

    def test_a_network_that_forgets_its_norms_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def drops_norms(network: nn.Module, x: Tensor) -> nn.Module:
            broken = Tiny().eval().requires_grad_(False)
            broken.load_state_dict(network.state_dict())
            broken.branch[1] = nn.Identity()
            return broken

        fused = Route(FUSED, drops_norms, ours=True, formats=routes.FORMATS[:1])
        monkeypatch.setattr(routes, "NETWORK_ROUTES", (*routes.NETWORK_ROUTES[:2], fused))
        status, written = bench(tmp_path, "models", "--model", "tiny", "--no-compile")
        assert status == 1
        assert "wrong result" in written["models"]["failures"][0]

    @pytest.mark.parametrize(
        ("error", "left_out", "broke_off"),
        [
            (torch.OutOfMemoryError("too much"), "memory", []),
            (RuntimeError("gone\nlines"), "", ["first: RuntimeError: gone"]),
            (KeyboardInterrupt(), "interrupted", []),
        ],
    )
    def test_what_breaks_off_is_said_and_the_rest_goes_on(
        self, error: BaseException, left_out: str, broke_off: list[str]
    ) -> None:
        def measured() -> Record:
            if not outcome.left_out and not outcome.broke_off:
                raise error
            return record(name="second")

        outcome = Outcome()
        made = setting()
        run = Run(made, outcome, [].append)
        for name in ("first", "second"):
            run.measure(name, name, measured)
        assert left_out in outcome.left_out.get("first", "")
        assert outcome.failures == broke_off
        assert len(outcome.records) == (not made.budget.interrupted)

    def test_an_interrupted_run_writes_what_it_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(row: cases.Row, run: Run) -> Record:
            raise KeyboardInterrupt

        monkeypatch.setattr(jobs, "measure_layer", interrupt)
        status, written = bench(tmp_path, "layers")
        assert (status, len(written["layers"]["left_out"])) == (130, 2)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["networks"], "'models', 'layers'"),
            (["--dtype", "fp16,int8"], "unknown dtype 'int8' (choose from fp16, bf16, tf32, fp32)"),
            (
                ["--suite", "all"],
                "unknown suite 'all' (choose from default, quick, depthwise, grouped, resnet50",
            ),
            (["--model", "alexnet"], "unknown network 'alexnet'"),
            (["--without", "magic"], "unknown route 'magic' (choose from"),
            (["--batch", "8,0"], "1 or more, got '8,0'"),
            (["--budget", "-1"], "above 0, got '-1'"),
            (["--any-device"], "goes with compare"),
            (["compare", "a.json"], "compare takes two"),
            (["compare", "a.json", "b.json"], "cannot read a.json"),
            (["layers", "--resume", str(ROOT / "setup.py")], "cannot read"),
            (["layers", "--resume", str(H200 / "layers.json")], "cannot be resumed here"),
            (["layers", "--resume", str(H200 / "first.json")], "schema"),
        ],
    )
    def test_errors_say_what_is_allowed(
        self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, *([] if arguments[0] == "compare" else ["--device", "cpu"])])
        assert stopped.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())

    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        text = capsys.readouterr().out
        assert all(name in text for name in (*cli.JOBS, *cases.SUITES, *networks.MODELS, *BY_NAME))
        assert all(action.help for action in cli.parser()._actions)


class TestBudgetAndResume:
    def test_a_budget_leaves_out_the_end_and_a_resumed_run_measures_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = FakeClock()
        measured = list[str]()
        measure_layer = jobs.measure_layer

        def counted(row: cases.Row, run: Run) -> Record:
            clock.spend(10.0)
            measured.append(row.name)
            return measure_layer(row, run)

        monkeypatch.setattr(jobs, "measure_layer", counted)
        monkeypatch.setattr(cli, "Budget", lambda seconds: Budget(seconds, clock=lambda: clock.now))
        _, first = bench(tmp_path, "layers", "--budget", "5")
        (left_out,) = first["layers"]["left_out"]
        assert measured == [row["name"] for row in first["layers"]["rows"]]
        _, second = bench(tmp_path, "layers", "--resume", str(tmp_path / "layers.json"))
        assert measured[1:] == [left_out]
        assert second["layers"]["rows"][0] == first["layers"]["rows"][0]
        assert (len(second["layers"]["rows"]), second["layers"]["left_out"]) == (2, {})

    def test_under_a_budget_compiled_routes_come_last(self) -> None:
        made = setting(budget=1e9, networks=("tiny",), batches=(1, 2))
        turns = [(compiled, case.name) for compiled, case in jobs.network_turns(made)]
        names = ["tiny n1 fp32", "tiny n2 fp32"]
        assert turns == [(compiled, name) for compiled in (False, True) for name in names]
        assert all(not compiled for compiled, _ in jobs.network_turns(setting(compiled=False)))

    def test_defaults(self) -> None:
        def setting_of(*arguments: str) -> measure.Setting:
            return cli.setting_of(cli.parser().parse_args([*arguments, "--device", "cpu"]))

        every, layers_alone = setting_of(), setting_of("depthwise")
        assert (every.budget.seconds, every.compiled, every.few) == (cli.CPU_SECONDS, False, True)
        assert (layers_alone.budget.seconds, layers_alone.suites) == (None, ("depthwise",))
        assert setting_of("models").compiled
        assert setting_of("layers", "--suite", "yolo,networks").suites[0] == "yolo"
        assert setting_of("layers", "--without", "cuDNN graph").without == (routes.GRAPH,)


class TestCompare:
    def files(self, folder: Path, *seconds: float, device: str = "a") -> list[Path]:
        paths = []
        for index, one in enumerate(seconds):
            made = record(entry(FUSED, one, one), entry(BASELINE, 2.0, 2.0))
            same = {"available": True, "kernels": [], "architectures": []}
            provenance = {
                "device": {"name": device if index == 0 else "a"},
                "torch": "",
                "sources": "",
                "seed": 0,
            }
            provenance |= {"fused_cna": same, "host": {"threads": 1}}
            paths.append(folder / f"{index}.json")
            write_json(paths[-1], {"provenance": provenance, "layers": {"rows": [made.as_json()]}})
        return paths

    @pytest.mark.parametrize(("after", "verdict"), [(0.5, "faster"), (2.0, "slower"), (1.0, "even")])
    def test_what_changed(self, after: float, verdict: str, tmp_path: Path) -> None:
        (change,) = compare_files(*self.files(tmp_path, 1.0, after)).changes
        assert (change.ratio.median, change.ratio.verdict, change.control) == (1 / after, verdict, 1.0)
        paths = [str(path) for path in self.files(tmp_path, 1.0, after)]
        assert cli.main(["compare", *paths]) == 0
        assert (tmp_path / "compare.png").exists()

    def test_two_devices(self, tmp_path: Path) -> None:
        paths = self.files(tmp_path, 1.0, 1.0, device="b")
        with pytest.raises(ValueError, match="--any-device"):
            compare_files(*paths)
        assert compare_files(*paths, any_device=True).changes

    @pytest.mark.parametrize("name", ["layers.json", "models.json"])
    def test_results_of_the_schema_before_are_read(self, name: str) -> None:
        later = H200.with_name("h200-2026-11-26-two-rows")
        compared = compare_files(H200 / name, later / name)
        assert {change.group[1] for change in compared.changes} == {"graph", "launched"}
        assert all(change.control for change in compared.changes)
