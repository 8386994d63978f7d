"""The bench's jobs from beginning to end on tiny inputs, its command line, and the files it leaves."""

import json
import subprocess
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the bench prints with rich")

from rich.console import Console

from bench import cli, jobs, layers, overhead, provenance, report
from bench.checks import allowed_for_rivals, allowed_for_us, largest_image_error, poison, relative_error
from bench.layer_list import Layer, layers_of
from bench.layer_result import BASELINE, Comparison, Entry, LayerResult, LayersResult, compare, judge
from bench.roofline import Ceilings, Floor, measure_ceilings
from bench.routes import Call, Case, Fused, Route, ThreeStep, make_case
from bench.setting import Budget, Effort, Setting, fused_path
from bench.stats import Summary
from bench.timing import CapturedCalls, RandomPool, Work

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e12, 1, 1, "float32")
SMALL = replace(layers_of("default")[0], cin=8, cout=4, h=6, w=6)


def setting(*, budget: float | None = None, device: torch.device = CPU) -> Setting:
    return Setting(device, torch.float32, "quick", 2, Effort(3, 0.0), Budget(budget), seed=0)


def exact(value: float) -> Summary:
    return Summary(value, value, value, 1)


def entry(route: str, seconds: float, *, error: float = 1e-7, ours: bool = False) -> Entry:
    return Entry(route, "channels_last", ours, error=error, samples={"launched": [seconds, seconds]})


def layer_result(speedup: float, **changes: Any) -> LayerResult:
    kind = "faster" if speedup > 1 else "slower" if speedup < 1 else "even"
    comparison = Comparison(exact(1e-3), "folded conv", exact(speedup * 1e-3), exact(speedup), kind, 0.5)
    named = replace(SMALL, cout=4 + round(8 * speedup))
    entries = [entry("fused", 1e-3, ours=True), entry(BASELINE, 1e-3)]
    both = {"launched": comparison, "graph": comparison}
    return replace(LayerResult(named, 2, Floor(1e-4, "memory"), 10, 20, 3, entries, both, None), **changes)


class TestChecks:
    def test_relative_error(self) -> None:
        expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
        assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
        assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
        assert largest_image_error(torch.tensor([[3.0, 4.0], [3.0, 4.5]]), torch.stack([expected] * 2)) == (
            pytest.approx(0.1)
        )

    def test_ours_is_held_to_the_contract(self) -> None:
        assert allowed_for_us(1e-2, torch.float16) == pytest.approx(1.05e-2)
        assert allowed_for_us(0.0, torch.float16) == 4 * 2.0**-11
        assert allowed_for_rivals(0.0, torch.float16) == 16 * 2.0**-11

    def test_poison(self) -> None:
        output = torch.ones(8)
        poison(output)
        assert output.isnan().all()


class TestComparison:
    def test_best_rival_counts_and_wrong_ones_do_not(self) -> None:
        entries = [
            entry("fused", 2.0, ours=True),
            entry(BASELINE, 6.0),
            entry("slow", 8.0),
            entry("wrong", 1.0, error=0.5),
        ]
        assert judge(entries, torch.float32) is None
        assert "wrong result" in str(entries[3].refused)
        comparison = compare(entries, Floor(1.0, "memory"))["launched"]
        assert comparison.rival == BASELINE
        assert comparison.speedup.median == 3.0
        assert comparison.verdict == "faster"
        assert comparison.roofline_share == 0.5

    @pytest.mark.parametrize("error", [1e-5, float("inf")])
    def test_a_wrong_fused_result_is_a_failure_and_not_compared(self, error: float) -> None:
        entries = [entry("fused", 2.0, ours=True, error=error), entry(BASELINE, 6.0)]
        assert "fused (channels_last): wrong result" in str(judge(entries, torch.float32))
        assert compare(entries, Floor(1.0, "memory")) == {}

    def test_losses_come_first_and_are_counted(self) -> None:
        result = LayersResult(
            "quick", CEILINGS, [layer_result(2.0), layer_result(0.5), layer_result(1.0)], []
        )
        names = [one.layer.name for one in result.ordered("graph")]
        assert names == [one.layer.name for one in (layer_result(0.5), layer_result(1.0), layer_result(2.0))]
        assert result.summary("graph") == {
            "geometric_mean_speedup": pytest.approx(1.0),
            "slower": names[:1],
            "even": names[1:2],
            "faster": names[2:],
        }

    def test_the_table_names_losses_before_all_layers(self) -> None:
        console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        report.print_layers(
            console, LayersResult("quick", CEILINGS, [layer_result(2.0), layer_result(0.5)], ["left"])
        )
        lines = console.export_text().splitlines()
        slower, faster = layer_result(0.5).layer.name, layer_result(2.0).layer.name
        assert "slower than the best rival, in a CUDA graph: 1" in lines
        assert f"  {slower}: 0.50 of folded conv" in lines
        first_table = next(index for index, line in enumerate(lines) if "slowest first" in line)
        assert lines.index(f"  {slower}: 0.50 of folded conv") < first_table
        assert any(faster in line and "2.00" in line and "50% memory" in line for line in lines[first_table:])
        assert "left out, the budget was spent: left" in lines


class Broken(Fused):
    """A fused route that leaves a pixel wrong."""

    def prepare(self, case: Case, memory_format: torch.memory_format) -> Call:
        call = super().prepare(case, memory_format)

        def wrong(*inputs: Tensor) -> Tensor:
            output = call(*inputs)
            output[0, 0, 0, 0] += 1
            return output

        return wrong


class Refusing(ThreeStep):
    """A rival that its library does not support."""

    name = "refusing"

    def prepare(self, case: Case, memory_format: torch.memory_format) -> Call:
        raise RuntimeError("no engine for this\nand more lines")


class TestLayers:
    def measure(self, routes: tuple[Route, ...], monkeypatch: pytest.MonkeyPatch) -> LayerResult:
        monkeypatch.setattr(layers, "ROUTES", routes)
        monkeypatch.setattr(layers, "input_sets_needed", lambda *_: 2)
        pool = RandomPool(CPU, torch.float32, seed=0)
        return layers.measure(SMALL, 2, setting(), pool, CEILINGS)

    def test_both_formats_are_checked_and_timed_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.measure((Fused(), ThreeStep(), Refusing()), monkeypatch)
        assert result.failure is None
        assert {(one.route, one.memory_format) for one in result.entries} == {
            (route, memory_format)
            for route in ("fused", BASELINE, "refusing")
            for memory_format in ("channels_last", "contiguous_format")
        }
        timed = [one for one in result.entries if one.route != "refusing"]
        assert all(one.error is not None and 0 < one.error < 1e-6 for one in timed)
        assert all(len(one.samples["launched"]) == 3 for one in timed)
        assert [one.refused for one in result.entries if one.route == "refusing"] == [
            "RuntimeError: no engine for this"
        ] * 2
        assert result.comparisons["launched"].rival == BASELINE

    def test_a_wrong_pixel_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.measure((Broken(), ThreeStep()), monkeypatch)
        assert "wrong result" in str(result.failure)
        assert result.comparisons == {}

    @pytest.mark.parametrize("writes", [True, False])
    def test_a_graph_that_writes_nothing_is_found(
        self, writes: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @dataclass
        class Graph:
            call: Call
            inputs: tuple[Tensor, ...]
            output: Tensor

            def replay(self) -> None:
                if writes:
                    self.output.copy_(self.call(*self.inputs))

        def capture(call: Call, input_sets: list[tuple[Tensor, ...]]) -> CapturedCalls:
            graph = Graph(call, input_sets[0], call(*input_sets[0]))
            return CapturedCalls(graph, graph.output, Work(graph.replay, len(input_sets)))  # type: ignore[arg-type]

        monkeypatch.setattr(layers, "captured", capture)
        case = replace(make_case(SMALL, CPU, torch.float32, seed=0), device=torch.device("cuda"))
        shape = (2, SMALL.cin, SMALL.h, SMALL.w)
        input_sets = RandomPool(CPU, torch.float32, seed=0).input_sets([shape], 2, torch.channels_last)
        with torch.inference_mode():
            expected = layers._expected(case, input_sets[0])
            prepared, works = layers._prepare(ThreeStep(), case, input_sets, expected, torch.channels_last)
        assert set(works) == {"launched", "graph"}
        assert works["graph"].calls == 2
        assert prepared.error is not None
        assert (prepared.error < 1e-6) == writes

    def test_a_layer_that_breaks_off_is_a_failure_and_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measure(layer: Layer, *_: object) -> LayerResult:
            if layer.depthwise:
                raise RuntimeError("out of memory\nand more")
            return layer_result(2.0, layer=layer)

        monkeypatch.setattr(layers, "measure_ceilings", lambda *_, **__: CEILINGS)
        monkeypatch.setattr(layers, "measure", measure)
        result = layers.run(setting(), lambda name: None)
        depthwise = [layer.name for layer in layers_of("quick") if layer.depthwise]
        assert result.failures == [f"{name}: RuntimeError: out of memory" for name in depthwise]
        assert len(result.results) + len(depthwise) == len(layers_of("quick"))

    def test_a_spent_budget_leaves_layers_out_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "measure_ceilings", lambda *_, **__: CEILINGS)
        result = layers.run(setting(budget=1e-9), lambda name: None)
        assert result.results == []
        assert result.left_out == [layer.name for layer in layers_of("quick")]
        assert result.as_json()["summary"] == {}


class TestOverhead:
    def test_measures_three_ways(self) -> None:
        steps: list[str] = []
        result = overhead.run(setting(), steps.append)
        assert steps == ["call overhead"]
        assert min(result.fused.median, result.three_modules.median, result.hand_written.median) > 0
        assert result.goal == 1.1
        assert result.reached == (result.ratio.median <= 1.1)
        assert json.loads(json.dumps(result.as_json()))["ratio"]["count"] == 15


class TestPipeline:
    def test_photographs_become_different_normalised_crops(self) -> None:
        pytest.importorskip("sklearn", reason="the photographs ship inside scikit-learn")
        from bench.photographs import crops, photographs

        images = photographs()
        assert [tuple(image.shape) for image in images] == [(1, 3, 427, 640)] * 2
        batch = crops(images, 4, 32, seed=3)
        assert batch.shape == (4, 3, 32, 32)
        assert -2.2 < float(batch.min()) < float(batch.max()) < 2.7
        assert len({float(image.sum()) for image in batch}) == 4
        assert torch.equal(batch, crops(images, 4, 32, seed=3))
        assert not torch.equal(batch, crops(images, 4, 32, seed=4))

    def test_calibration_is_the_mean_over_batches(self) -> None:
        pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from bench.pipeline import calibrate

        network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
        batches = [torch.randn(4, 3, 5, 5) + shift for shift in (0.0, 4.0)]
        calibrate(network, batches)
        norm = network[0]
        assert isinstance(norm, nn.BatchNorm2d)
        means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
        variances = torch.stack([batch.var((0, 2, 3)) for batch in batches])
        torch.testing.assert_close(norm.running_mean, means.mean(0))
        torch.testing.assert_close(norm.running_var, variances.mean(0))
        assert norm.momentum == 0.1
        assert not any(module.training for module in network.modules())

    def test_every_conv_norm_activation_is_replaced(self) -> None:
        torchvision = pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from torchvision.ops.misc import Conv2dNormActivation

        from bench.pipeline import replace_layers
        from fused_cna import ConvNormAct

        network = torchvision.models.mobilenet_v2(weights=None).eval()
        before = sum(isinstance(module, Conv2dNormActivation) for module in network.modules())
        assert replace_layers(network) == before > 30
        kinds = [type(module) for module in network.modules()]
        assert kinds.count(ConvNormAct) == before
        assert Conv2dNormActivation not in kinds

    def test_a_network_gives_the_same_answers(self) -> None:
        for module in ("torchvision", "sklearn"):
            pytest.importorskip(module, reason="the pipeline needs it")
        from bench import pipeline
        from bench.photographs import photographs

        result = pipeline.measure("mobilenet_v2", photographs(), setting(), size=32)
        assert result.layers_replaced == 35
        assert result.convolutions == 52
        assert result.failure is None
        assert 0 < result.eager_error < 1e-3
        assert result.top1_agreement == 1.0
        assert result.latency["launched"].before.median > 0
        assert json.loads(json.dumps(result.as_json()))["network"] == "mobilenet_v2"

    def test_a_wrong_network_is_a_failure(self) -> None:
        pytest.importorskip("torchvision", reason="the pipeline's networks are torchvision's")
        from bench.pipeline import failure_of

        assert failure_of(1e-5, 9e-6, torch.float32) is None
        assert "at most 1.80e-05 is allowed" in str(failure_of(1e-4, 9e-6, torch.float32))


class TestProvenance:
    def test_says_everything(self) -> None:
        said = json.loads(json.dumps(provenance.provenance(setting(), ["layers", "--batch", "2"], 0.25)))
        assert said["command"] == ["python", "-m", "bench", "layers", "--batch", "2"]
        assert said["torch"] == torch.__version__
        assert said["fused_cna"]["version"]
        assert said["host"]["threads"] == torch.get_num_threads()
        assert said["device"] == {"type": "cpu", "name": provenance.cpu_model()}
        assert datetime.fromisoformat(said["date"]).tzinfo is not None
        assert said["seed"] == 0
        assert said["host"]["load_before"] == 0.25

    def test_a_gpu_is_described(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU 80GB")
        monkeypatch.setattr(provenance, "_output", lambda *command: "580.1\n580.1\n")
        gpu = torch.device("cuda", 0)
        described = provenance.device_description(gpu)
        assert (described["name"], described["capability"], described["driver"]) == (
            "A GPU 80GB",
            [9, 0],
            "580.1",
        )
        assert set(described) >= {"cuda", "cudnn", "l2_bytes", "multiprocessors", "memory_bytes"}
        assert cli.default_folder(gpu, datetime(2026, 1, 2, 3, 4, 5)) == "a-gpu-80gb-20260102-030405"

    def test_commit_and_dirt(self, tmp_path: Path) -> None:
        def git(*arguments: str) -> None:
            identity = ("-c", "user.name=a", "-c", "user.email=a@b")
            subprocess.run(
                ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
            )

        git("init")
        assert provenance.git_state(tmp_path) is None
        (tmp_path / "file").write_text("a")
        git("add", "file")
        git("commit", "-m", "first")
        state = provenance.git_state(tmp_path)
        assert state is not None
        assert (len(state["commit"]), state["dirty"]) == (40, False)
        (tmp_path / "file").write_text("b")
        changed = provenance.git_state(tmp_path)
        assert changed == {"commit": state["commit"], "dirty": True}


class TestCommandLine:
    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        for option in ("--device", "--dtype", "--batch", "--suite", "--out", "--budget", *jobs.JOBS):
            assert option in text
        assert all(action.help for action in cli.parser()._actions)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["networks"], "'pipeline', 'layers', 'overhead'"),
            (["--device", "tpu"], "'auto', 'cpu', 'cuda'"),
            (["--dtype", "int8"], "'float32', 'float16', 'bfloat16'"),
            (["--suite", "all"], "'default', 'quick'"),
            (["--batch", "0"], "1 or more, got '0'"),
            (["--batch", "two"], "1 or more, got 'two'"),
            (["--budget", "-1"], "above 0, got '-1'"),
            (["--budget", "nan"], "above 0, got 'nan'"),
        ],
    )
    def test_errors_say_what_is_allowed(
        self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err.replace("choose from auto, cpu, cuda", "'auto', 'cpu', 'cuda'")

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            cli.main(["--device", "cuda"])
        assert "sees no GPU here; allowed here: auto, cpu" in capsys.readouterr().err

    def test_defaults_of_a_cpu(self) -> None:
        made = cli.setting_of(cli.parser().parse_args(["--device", "cpu"]))
        assert (made.device, made.dtype, made.batch, made.suite) == (CPU, torch.float32, None, "default")
        assert made.budget.allows(keep=1e9)
        assert cli.default_folder(CPU, datetime(2026, 1, 31, 23, 59, 58)) == "cpu-20260131-235958"

    def test_a_cpu_says_what_is_timed(self) -> None:
        path = fused_path(CPU)
        assert not path.kernels
        assert "eager fallback" in path.line
        assert "On a GPU this run would" in path.line


class TestRun:
    def run(self, monkeypatch: pytest.MonkeyPatch, out: Path, *names: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(layers, "layers_of", lambda suite: [SMALL])
        monkeypatch.setattr(layers, "input_sets_needed", lambda *_: 2)
        monkeypatch.setattr(
            layers,
            "measure_ceilings",
            lambda *_, seed: measure_ceilings(CPU, torch.float32, seed=seed, small=True),
        )
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        status = jobs.run(setting(), names, out, ["--batch", "2"], Console(width=120))
        return status, json.loads((out / "results.json").read_text())

    def test_leaves_results_and_plot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib", reason="the plot needs it")
        status, written = self.run(monkeypatch, tmp_path, "layers", "overhead")
        assert status == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.png", "results.json"]
        assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
        assert list(written) == [
            "schema",
            "provenance",
            "kernels",
            "fused_path",
            "skipped",
            "layers",
            "overhead",
        ]
        assert written["schema"] == report.SCHEMA
        assert not written["kernels"]
        (row,) = written["layers"]["layers"]
        assert row["name"] == SMALL.name
        assert set(row["comparisons"]["launched"]) == {
            "fused_seconds",
            "rival",
            "rival_seconds",
            "speedup",
            "verdict",
            "roofline_share",
        }
        assert row["routes"][0]["seconds"]["launched"]["count"] == 3

    def test_a_wrong_result_fails_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "ROUTES", (Broken(), ThreeStep()))
        status, written = self.run(monkeypatch, tmp_path, "layers")
        assert status == 1
        assert "wrong result" in written["layers"]["failures"][0]

    def test_a_job_that_breaks_off_does_not_take_the_others_along(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def break_off(*_: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(layers, "run", break_off)
        status, written = self.run(monkeypatch, tmp_path, "layers", "overhead")
        assert status == 1
        assert written["layers"] == {"broke_off": "layers broke off: RuntimeError: the device is gone"}
        assert written["overhead"]["shape"] == [1, 16, 8, 8]

    def test_what_cannot_run_is_skipped_with_its_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            jobs.JOBS, "pipeline", replace(jobs.JOBS["pipeline"], needs=("torch", "no_such_module"))
        )
        status, written = self.run(monkeypatch, tmp_path, "pipeline", "overhead")
        assert status == 0
        assert written["skipped"] == {"pipeline": "it needs no_such_module, not installed here"}
        spent = jobs.why_skip(jobs.JOBS["overhead"], setting(budget=1e-9))
        assert spent == "the budget of 1e-09 s was spent before it"

    def test_json_has_no_infinity(self, tmp_path: Path) -> None:
        report.write_json(tmp_path / "results.json", {"errors": ({"a": float("inf")}, [float("nan"), 1.5])})
        written = json.loads((tmp_path / "results.json").read_text())
        assert written == {"schema": report.SCHEMA, "errors": [{"a": "inf"}, ["nan", 1.5]]}
