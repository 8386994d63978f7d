"""What is printed and drawn: tables with and without rich, pictures, and two results side by side."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import cli, compare, plot, report, terminal
from bench.layer_report import layers_summary, print_layers
from bench.layer_result import LayerResult
from bench.model_cases import GOALS
from bench.model_report import models_summary
from bench.model_result import ModelsResult
from bench.summary import LayersResult
from bench.timing import Rotation
from fused_cna import _progress
from tests.bench_cases import CEILINGS, exact, layer, layer_result, row
from tests.bench_model_cases import result_with_goal

LOSS = layer_result(0.5)
WIN = layer_result(2.0)
PLANNED = {("quick", 2, "fp32"): {LOSS.row.key: 1.0, WIN.row.key: 1.0, "left": 2.0}}
RESULT = LayersResult(
    {"quick": "here"}, {"fp32": CEILINGS}, PLANNED, [WIN, LOSS], left_out=["left"], too_large=["huge"]
)


@pytest.fixture(params=[True, False], ids=["rich", "plain"])
def console(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param and not terminal.HAS_RICH:
        pytest.skip("rich is not installed")
    monkeypatch.setattr(terminal, "HAS_RICH", request.param)
    return terminal.make_console()


class TestTables:
    def test_the_slowest_rows_come_first(self, console: Any, capsys: pytest.CaptureFixture[str]) -> None:
        print_layers(console, RESULT)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        table = next(index for index, line in enumerate(lines) if "slowest first" in line)
        rows = [line for line in lines[table:] if LOSS.name in line or WIN.name in line]
        assert LOSS.name in rows[0]
        assert WIN.name in rows[1]
        assert "50% memory" in rows[1]
        assert "left out for want of time: 1 rows: left" in lines
        assert "did not fit the device's memory: 1 rows: huge" in lines

    def test_suites_have_counts_means_and_the_worst(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_layers(console, RESULT)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  quick fp32")]
        assert lines == 2 * [
            "  quick fp32 n2: mean 1.00 (4.00 to three-step), network 1.25, roofline 10%, 1/0/1, "
            f"2 of 3 layers, 50%, worst 0.50 {LOSS.row.layer.name}"
        ]

    def test_the_summary_has_ceilings_means_and_losses(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        timed = replace(LOSS, entries=[replace(LOSS.entries[0], first_call_seconds=2.5)])
        summary = layers_summary(replace(RESULT, results=[WIN, timed]))
        report.print_summary(console, summary, ["networks: [Errno 5] wrong"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[:4] == [
            "summary",
            "layers: 2 measured, 1 left out for want of time, 1 too large; first calls: fused 2.5 s",
            "ceilings, fp32: copy 1.0 GB/s (read + written), matrix product 1 TFLOP/s (float32)",
            "best rival / fused, in a CUDA graph:",
        ]
        assert lines[4].startswith("  quick fp32 n2: mean 1.00")
        assert lines[5:] == [
            "slower than the best rival, in a CUDA graph: 1",
            f"  {LOSS.name}: 0.50, 1000.0 us, 500.0 us by folded conv (quick)",
            "launched eagerly: 1 slower, 0 even, 1 faster",
            "wrong or not run: 1",
            "  networks: [Errno 5] wrong",
        ]

    def test_the_summary_of_many_losses_is_short(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        suites = [f"a suite with a name of thirty {index:2}" for index in range(20)]
        many = [layer_result(0.5, row(layer(h=6 + h), **dict.fromkeys(suites, 1))) for h in range(50)]
        planned = {(suite, 2, "fp32"): {one.row.key: 1.0 for one in many} for suite in suites}
        ceilings = dict.fromkeys(("fp16", "bf16", "tf32", "fp32"), CEILINGS)
        summary = layers_summary(LayersResult(dict.fromkeys(suites, ""), ceilings, planned, many))
        networks = models_summary(ModelsResult(True, 30 * [result_with_goal(GOALS[0], 3.0, 3.5, 5.9)]))
        report.print_summary(console, [*summary, *networks], 50 * ["something went wrong " * 20])
        text = capsys.readouterr().out
        assert "slower than the best rival, in a CUDA graph: 50" in text
        assert "networks: 30 measured" in text
        assert "wrong or not run: 50" in text
        assert len(text) <= 6000

    def test_rows_that_stay_in_the_cache_are_marked(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cached = replace(LOSS, rotation=Rotation(2, 100, 1000))
        print_layers(console, replace(RESULT, results=[cached, WIN]))
        lines = capsys.readouterr().out.splitlines()
        assert [("50% memory *" in line, "50% memory" in line) for line in lines].count((True, True)) == 2
        assert sum("*: too small to outrun the cache" in line for line in lines) == 2
        print_layers(console, RESULT)
        assert "*" not in capsys.readouterr().out
        in_summary = "\n".join(layers_summary(replace(RESULT, results=[cached])))
        assert "folded conv (quick, stays in the cache)" in in_summary

    def test_markup_does_not_show(self, console: Any, capsys: pytest.CaptureFixture[str]) -> None:
        table = terminal.make_table("title", "caption")
        table.add_column("name")
        table.add_column("number", justify="right")
        table.add_row("[red]one[/]", "7")
        console.print(table)
        console.print("[yellow]careful:[/yellow] said")
        text = capsys.readouterr().out
        assert "[" not in text.replace("\x1b[", "")
        for word in ("title", "caption", "number", "one", "7", "careful: said"):
            assert word in text

    @pytest.mark.parametrize(("seconds", "lines"), [(0.0, 10), (3.0, 30)])
    def test_a_log_says_how_far_a_run_came(
        self, seconds: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = itertools.count(0.0, seconds)
        monkeypatch.setattr(_progress.time, "monotonic", lambda: next(now))
        with _progress.progress("layers", 100, shown=True) as step:
            for index in range(100):
                step(f"layer {index}")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
        assert said[0] == f"layers 1 of 100: layer 0 ({seconds:.0f} s)"

    def test_runs_without_rich_and_matplotlib(self, tmp_path: Path) -> None:
        program = (
            "import sys; sys.modules['rich'] = None; sys.modules['matplotlib'] = None\n"
            "from bench.terminal import HAS_RICH; assert not HAS_RICH\n"
            "from bench.cli import main\n"
            f"sys.exit(main(['overhead', '--device', 'cpu', '--out', {str(tmp_path)!r}]))"
        )
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "rich is not installed here" in done.stdout
        assert "host time of a call: " in done.stdout
        assert json.loads((tmp_path / "overhead.json").read_text())["overhead"]["shape"] == [1, 16, 8, 8]


class TestPlots:
    def test_all_are_made(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="the plots need it")
        many = [
            layer_result(0.8 + index / 50, row(layer(h=6 + index), precision=precision))
            for index in range(plot.MOST_BARS + 5)
            for precision in ("fp32", "tf32")
        ]
        planned = {("quick", 2, name): {one.row.key: 1.0 for one in many} for name in ("fp32", "tf32")}
        result = LayersResult({"quick": "here"}, {"fp32": CEILINGS, "tf32": CEILINGS}, planned, many)
        paths = plot.plot_all(tmp_path / "new", result, "a heading", "a note " * 30)
        assert [path.name for path in paths] == ["layers.png", "suites.png", "roofline.png"]
        for path in paths:
            assert path.read_bytes().startswith(b"\x89PNG")


def write(path: Path, results: list[LayerResult], device: str = "a device", torch: str = "2.14") -> Path:
    provenance = {
        "device": {"type": "cpu", "name": device},
        "torch": torch,
        "sources": "0",
        "seed": 0,
        "fused_cna": {},
        "host": {"threads": 1},
    }
    layers = {"rows": [one.as_json() for one in results]}
    report.write_json(path, {"provenance": provenance, "layers": layers})
    return path


def timed(microseconds: float, h: int) -> LayerResult:
    result = layer_result(2.0, row(layer(h=h)))
    before = result.comparisons["graph"]
    return replace(result, comparisons={"graph": replace(before, fused_seconds=exact(microseconds / 1e6))})


class TestCompare:
    def files(self, folder: Path, **second: str) -> tuple[Path, Path]:
        before = [timed(10, 5), timed(10, 6), timed(10, 7), timed(10, 8)]
        after = [timed(20, 5), timed(5, 6), timed(10, 7), timed(10, 9)]
        return write(folder / "a.json", before), write(folder / "b.json", after, **second)

    def test_what_changed_and_what_did_not(self, tmp_path: Path) -> None:
        compared = compare.compare_files(*self.files(tmp_path))
        assert [(one.ratio, one.verdict) for one in compared.changes] == [
            (pytest.approx(0.5), "slower"),
            (pytest.approx(1.0), "even"),
            (pytest.approx(2.0), "faster"),
        ]
        assert {one.control for one in compared.changes} == {1.0}
        assert (len(compared.only_before), len(compared.only_after)) == (1, 1)
        assert compared.differences == []

    def test_overlapping_quartiles_are_no_change(self) -> None:
        wide = replace(exact(1.0), low=0.5, high=1.5)
        change = compare.Change("one", "fp32", 1, "graph", wide, exact(1.2), None)
        assert change.verdict == "even"

    def test_prints_and_plots(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib", reason="the plot needs it")
        before, after = self.files(tmp_path, torch="2.15")
        assert cli.main(["--compare", str(before), str(after), "--out", str(tmp_path / "out")]) == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert "differs: torch: 2.14 and 2.15" in lines
        slower, faster = lines.index("got slower: 1"), lines.index("got faster: 1")
        assert slower < faster
        assert "0.50 (10.0 to 20.0 us, three-step 1.00)" in lines[slower + 1]
        assert "2.00 (10.0 to 5.0 us, three-step 1.00)" in lines[faster + 1]
        assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")

    def test_two_devices_are_refused_unless_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = self.files(tmp_path, device="another")
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--compare", *map(str, files)])
        assert stopped.value.code == 2
        assert "'a device'" in (said := capsys.readouterr().err)
        assert "--any-device" in said
        compared = compare.compare_files(*files, any_device=True)
        assert compared.differences == ["device name: a device and another"]

    def test_nothing_in_common(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{h}.json", [timed(10, h)]) for h in (5, 6)]
        with pytest.raises(ValueError, match="no row in common"):
            compare.compare_files(*paths)

    def test_a_result_without_layers(self, tmp_path: Path) -> None:
        report.write_json(tmp_path / "a.json", {"overhead": {}})
        with pytest.raises(ValueError, match=r"holds no measured layers"):
            compare.load_rows(tmp_path / "a.json")
