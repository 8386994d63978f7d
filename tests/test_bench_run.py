"""The bench from its command line to the files it leaves, on tiny inputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cli, jobs, layers, report, rows, terminal
from bench.layer_result import LayerResult
from bench.networks import NETWORKS
from bench.roofline import measure_ceilings
from bench.routes import ThreeStep
from bench.rows import SUITES
from bench.setting import PRECISIONS, fused_path
from bench.summary import LayersResult
from tests.bench_cases import CPU, layer, layer_result, setting, two_sets
from tests.test_bench_layers import Broken

SMALL = (layer(h=6, w=6), layer(residual="add_act", cout=8))


class TestCommandLine:
    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert " ".join(cli.ORDER_RULE.split()) in " ".join(text.split())
        for option in (
            "--device",
            "--dtype",
            "--batch",
            "--suite",
            "--out",
            "--budget",
            "--resume",
            "--compare",
            "--any-device",
            "--model",
            "--max-autotune",
            "--no-compile",
            *jobs.JOBS,
            *SUITES,
        ):
            assert option in text
        assert all(action.help for action in cli.parser()._actions)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["networks"], "'layers', 'models', 'pipeline', 'overhead'"),
            (["--device", "tpu"], "'auto', 'cpu', 'cuda'"),
            (["--dtype", "fp16,int8"], "unknown dtype 'int8' (choose from fp16, bf16, tf32, fp32)"),
            (["--suite", "all"], "unknown suite 'all' (choose from default, quick, resnet50"),
            (["--batch", "8,0"], "1 or more, got '0'"),
            (["--any-device"], "goes with --compare"),
            (["--no-compile", "--max-autotune"], "not allowed with"),
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
        assert (made.device, made.dtype, made.suites) == (CPU, torch.float32, ("default",))
        assert (made.precision.name, made.batches, made.layer_batches) == ("fp32", (), (1,))
        assert made.budget.allows(keep=1e9)
        assert cli.default_folder(CPU, datetime(2026, 1, 31, 23, 59, 58)) == "cpu-20260131-235958"

    def test_lists(self) -> None:
        arguments = [
            "--device",
            "cpu",
            "--suite",
            "yolo,networks",
            "--batch",
            "8, 1,8",
            "--dtype",
            "tf32,bf16",
        ]
        made = cli.setting_of(cli.parser().parse_args(arguments))
        assert made.suites == ("yolo", *(name for name in NETWORKS if name != "yolo"))
        assert made.layer_batches == (8, 1)
        assert [one.name for one in made.precisions] == ["tf32", "bf16"]
        assert made.dtype == torch.float32

    def test_a_cpu_says_what_is_timed(self) -> None:
        path = fused_path(CPU)
        assert not path.kernels
        assert "eager fallback" in path.line
        assert "On a GPU this run would" in path.line


class TestRun:
    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        out: Path,
        *names: str,
        resume: Path | None = None,
        **changes: Any,
    ) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(rows, "layers_of", lambda suite: SMALL)
        monkeypatch.setattr(layers, "layers_of", lambda suite: SMALL)
        monkeypatch.setattr(layers, "rotation_of", two_sets)
        monkeypatch.setattr(
            layers,
            "measure_ceilings",
            lambda device, precision, *, seed: measure_ceilings(device, precision, seed=seed, small=True),
        )
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        console = terminal.make_console()
        status = jobs.run(setting(**changes), names, out, ["--batch", "2"], console, resume)
        file = f"{names[0]}.json" if len(names) == 1 else "results.json"
        return status, json.loads((out / file).read_text())

    def test_leaves_results_and_plot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib", reason="the plot needs it")
        status, written = self.run(monkeypatch, tmp_path, "layers", "overhead")
        assert status == 0
        plots = ["layers.png", "roofline.png", "suites.png"]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*plots, "results.json"])
        assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots)
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
        row = written["layers"]["rows"][0]
        assert (row["name"], row["batch"], row["precision"]) == (SMALL[0].name, 2, "fp32")
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
        def break_off(*_: object, save: Callable[[LayersResult], None], **__: object) -> None:
            save(LayersResult({}, {}, results=[layer_result(2.0)]))
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(layers, "run", break_off)
        status, written = self.run(monkeypatch, tmp_path, "layers", "overhead")
        assert status == 1
        assert written["layers"]["broke_off"] == "layers broke off: RuntimeError: the device is gone"
        assert [one["name"] for one in written["layers"]["rows"]] == [layer_result(2.0).row.layer.name]
        assert written["overhead"]["shape"] == [1, 16, 8, 8]

    def test_an_interrupted_run_reports_what_it_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def measure(measured: rows.Row, *_: object) -> LayerResult:
            if measured.layer is SMALL[1]:
                raise KeyboardInterrupt
            return layer_result(0.5, measured)

        monkeypatch.setattr(layers, "measure", measure)
        status, written = self.run(monkeypatch, tmp_path, "layers", "overhead")
        assert status == 130
        assert [one["name"] for one in written["layers"]["rows"]] == [SMALL[0].name]
        assert written["layers"]["left_out"] == [f"fp32 n2 {SMALL[1].name}"]
        assert written["skipped"] == {"overhead": "the run was interrupted before it"}
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
        said = capsys.readouterr().out
        assert said.index("slowest first") < said.index(
            f"{SMALL[0].name}: 0.50, 1000.0 us, 500.0 us by folded conv"
        )

    def test_a_job_without_rows_may_be_interrupted_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(jobs.overhead, "run", interrupt)
        status, written = self.run(monkeypatch, tmp_path, "overhead", "layers")
        assert status == 130
        assert written["overhead"] == {"broke_off": "the run was interrupted"}
        assert list(written["skipped"]) == ["layers"]

    def test_every_dtype_and_batch_runs_on_a_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        every = tuple(PRECISIONS.values())
        status, written = self.run(monkeypatch, tmp_path, "layers", precisions=every, batches=(1, 2))
        assert status == 0
        measured = {(one["precision"], one["batch"]) for one in written["layers"]["rows"]}
        assert measured == {(one.name, batch) for one in every for batch in (1, 2)}
        assert {one["precision"] for one in written["layers"]["groups"]} == set(PRECISIONS)
        assert "eager fallback" in capsys.readouterr().out

    def test_resumes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run(monkeypatch, tmp_path / "first", "layers", batches=(1,))
        first = tmp_path / "first" / "layers.json"
        status, both = self.run(monkeypatch, tmp_path / "second", "layers", batches=(1, 2), resume=first)
        assert status == 0
        before = json.loads(first.read_text())["layers"]
        assert both["layers"]["rows"][: len(SMALL)] == before["rows"]
        assert len(both["layers"]["rows"]) == 2 * len(SMALL)
        assert both["layers"]["ceilings"] == before["ceilings"]

    def test_resumed_layers_are_kept_before_their_turn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, before = self.run(monkeypatch, tmp_path, "layers")
        _, after = self.run(monkeypatch, tmp_path, "overhead", resume=tmp_path / "layers.json")
        assert after["layers"] == before["layers"]
        # One job leaves the file of another alone.
        assert json.loads((tmp_path / "layers.json").read_text()) == before
        assert "overhead" in after

    def test_another_device_is_not_resumed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run(monkeypatch, tmp_path, "layers")
        path = tmp_path / "layers.json"
        path.write_text(path.read_text().replace('"type": "cpu"', '"type": "abacus"'))
        with pytest.raises(jobs.ResumeError, match="device type: abacus and cpu"):
            self.run(monkeypatch, tmp_path, "layers", resume=path)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (None, "cannot read"),
            ("{", "is not JSON"),
            ('{"schema": 1}', "got schema 1"),
            ("[]", "got schema None"),
        ],
    )
    def test_what_is_no_result_is_not_resumed(
        self, text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "results.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["overhead", "--device", "cpu", "--resume", str(path)])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err

    def test_without_matplotlib_the_numbers_are_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
        status, written = self.run(monkeypatch, tmp_path, "layers")
        assert status == 0
        assert len(written["layers"]["rows"]) == len(SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]
        assert "matplotlib is not installed here" in capsys.readouterr().out

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
