"""What is printed and drawn: tables with and without rich, pictures, and two results side by side."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import cli, compare, plot, report, terminal
from bench.layer_report import print_layers
from bench.layer_result import LayerResult
from bench.summary import LayersResult
from bench.timing import Rotation
from tests.bench_cases import CEILINGS, FakeClock, exact, layer, layer_result, row

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
    def test_losses_are_named_before_all_layers(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_layers(console, RESULT)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert "slower than the best rival, in a CUDA graph: 1" in lines
        named = lines.index(f"  {LOSS.name}: 0.50 of folded conv (quick)")
        table = next(index for index, line in enumerate(lines) if "slowest first" in line)
        assert named < table
        rows = [line for line in lines[table:] if LOSS.name in line or WIN.name in line]
        assert LOSS.name in rows[0]
        assert WIN.name in rows[1]
        assert "50% memory" in rows[1]
        assert "left out for want of time: 1 rows: left" in lines
        assert "did not fit the device's memory: 1 rows: huge" in lines

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

    def test_suites_have_counts_means_and_the_worst(
        self, console: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_layers(console, RESULT)
        lines = capsys.readouterr().out.splitlines()
        (first, _) = [line.split() for line in lines if line.split()[:2] == ["quick", "fp32"]]
        assert first[2:10] == ["2", "2", "of", "3", "50%", "1.00", "4.00", "1.25"]
        assert "1/0/1" in first
        assert " ".join(first).endswith(f"0.50 {LOSS.row.layer.name}")

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

    def test_a_log_says_how_far_a_run_came(
        self, console: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = FakeClock()
        monkeypatch.setattr(terminal.time, "monotonic", lambda: clock.now)
        with terminal.progress_of(console, "layers", 100) as step:
            for index in range(100):
                step(f"layer {index}")
                clock.spend(3.0)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "layers: 0 s, 0 of 100 done, now layer 0",
            "layers: 12 s, 4 of 100 done, now layer 4",
        ]
        assert len(lines) == 25

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
        assert json.loads((tmp_path / "results.json").read_text())["overhead"]["shape"] == [1, 16, 8, 8]


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
