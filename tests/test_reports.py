"""The reports on compiled kernels and on coverage: what they make of the tools' output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coverage_report import Hole, complaints, find_holes, read_counts, short_name
from tests.kernel_report import ENDS, KERNEL, MAIN_LOOP, MEANS, means, print_report, row
from tests.sass import CompiledKernel
from tests.test_machine_code import GEMM, SPLIT_K, straight

FILE = "csrc/kernels/a.cuh"
SOURCE = """\
template <class T> int a(int x) {
    if (x) return 1;
    return 2;
}
int b() {
    return 3;
}
"""


def line(
    number: int, count: int, branches: tuple[int, ...] = (), throws: tuple[int, ...] = ()
) -> dict[str, object]:
    ways = [{"count": way, "throw": False} for way in branches] + [
        {"count": way, "throw": True} for way in throws
    ]
    return {"line_number": number, "count": count, "branches": ways}


def function(name: str, first: int, last: int, calls: int) -> dict[str, object]:
    return {"demangled_name": name, "start_line": first, "end_line": last, "execution_count": calls}


def report(*lines: dict[str, object], functions: tuple[dict[str, object], ...] = ()) -> dict[str, object]:
    path = "csrc/kernels/../kernels/a.cuh"
    return {"files": [{"file": path, "lines": lines, "functions": functions}, _elsewhere()]}


def _elsewhere() -> dict[str, object]:
    return {"file": "tests/simt/src/block.cpp", "lines": [line(1, 0)], "functions": []}


def holes_of(tmp_path: Path, *reports: dict[str, object]) -> list[tuple[int, str, str]]:
    path = tmp_path / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SOURCE)
    return [(hole.number, hole.text, hole.missing) for hole in find_holes(read_counts(reports), tmp_path)]


def test_instantiations_count_together(tmp_path: Path) -> None:
    one, other = report(line(2, 5, (5, 0)), line(3, 0)), report(line(2, 1, (0, 1)), line(3, 1))
    assert holes_of(tmp_path, one, other) == []
    assert holes_of(tmp_path, one) == [
        (2, "if (x) return 1;", "never went way 2 of 2"),
        (3, "return 2;", "never ran"),
    ]
    merged = read_counts([one, other])
    assert set(merged) == {FILE}
    assert merged[FILE].lines[3].idle == 1


def test_ways_of_exceptions_and_closing_braces_are_the_compilers(tmp_path: Path) -> None:
    assert holes_of(tmp_path, report(line(2, 1, (1, 1), (0,)), line(4, 0))) == []
    assert holes_of(tmp_path, report(line(2, 3, (0, 0)))) == [], "an instantiation without the branch"


def test_a_function_that_nothing_called_is_one_hole(tmp_path: Path) -> None:
    functions = (function("int a<float>(int)", 1, 4, 0), function("int a<half>(int)", 1, 4, 2))
    called = report(
        line(2, 2, (1, 1)), line(5, 0), line(6, 0), functions=(*functions, function("b()", 5, 7, 0))
    )
    assert holes_of(tmp_path, called) == [(5, "b", "never called")]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("fused_cna::memoised_plan(fused_cna::ConvProblem const&, std::pair<int, int>)", "memoised_plan"),
        ("void fused_cna::kernels::direct<float, fused_cna::Tile{1, (a)2}>(fused_cna::ConvArgs)", "direct"),
    ],
)
def test_functions_are_named_shortly(demangled: str, name: str) -> None:
    assert short_name(demangled) == name


def test_holes_and_arguments_must_match() -> None:
    holes = [Hole("a.cpp", 3, "return;", "never ran"), Hole("b.cpp", 4, "return;", "never ran")]
    assert complaints(holes, {"a.cpp": {"return;": "why"}, "b.cpp": {"return;": "why"}}) == []
    assert complaints(holes[:1], {}) == ["a.cpp:3: never ran: return;"]
    assert complaints([], {"a.cpp": {"return;": "why"}}) == [
        "a.cpp: argued, but reached or no longer there: return;"
    ]


MAIN = "LDGSTS.E.64 LDSM.16 HMMA.16816.F32 ?BRA>6 LDGSTS.E.64 ?BRA>2 FADD ?BRA>7"
EPILOGUE = "LDS.128 LDS.128 LDS ?BRA>15 LDG.E.128 FADD F2FP STG.E.128 ?BRA>9 EXIT"
HEADINGS = (*KERNEL, *MAIN_LOOP, *ENDS)


def kernel(name: str, architecture: str, registers: int) -> CompiledKernel:
    code = straight(f"S2R {MAIN} {EPILOGUE}")
    return CompiledKernel(name, architecture, registers, 128, 0, 0, lambda: code)


GEMMS = [kernel(GEMM, "sm_80", 120), kernel(GEMM, "sm_90a", 180)]


def test_a_row_of_the_kernel_report() -> None:
    cells = dict(zip(HEADINGS, row(GEMMS), strict=True))
    assert (cells["kernel"], cells["tile"], cells["dtype"]) == ("implicit_gemm_sm80", "128x32x32", "float16")
    assert (cells["rows"], cells["access"], cells["registers"]) == ("masked", "8 bytes", "120 / 180")
    assert cells["blocks"] == "2", "shared memory limits it on an A100, registers on an H100"
    assert [cells[heading] for heading in MAIN_LOOP[4:]] == ["1", "4", "20%"]
    assert [cells[heading] for heading in ENDS] == ["1", "3", "0", "0.9", "1.1"]
    assert row([kernel(SPLIT_K, "sm_80", 40)])[:3] == ("split_k", "", "float32")


def test_the_report_prints_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    cells = row(GEMMS)
    (gemms, *_) = families = list(means([{"implicit_gemm_sm80": [kernel]} for kernel in GEMMS]))
    assert gemms == ("implicit_gemm_sm80", "1", "3", "3", "0.0", "0")
    print_report([cells], families)
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in (*HEADINGS, *cells, *MEANS, *gemms))
