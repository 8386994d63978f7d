"""The reports on compiled kernels and on coverage: what they make of the tools' output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coverage_report import Hole, complaints, find_holes, read_counts, short_name
from tests.kernel_report import HEADINGS, gemm_row, pair, plain_row, print_table
from tests.machine_code import Instruction
from tests.sass import CompiledKernel, GemmKernel, LaunchBounds, Resources, gemm_kernel

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


GEMM = (
    "_ZN9fused_cna7kernels13implicit_gemmINS0_18ImplicitGemmTraitsI6__halfXtlNS_8GemmTileELi128ELi32ELi64ELi6ELi4E"
    "Li1ELi3ELb1ELb0EEELi8ENS0_11TensorCoresEEENS0_10MaskedRowsEEEvNS0_16ImplicitGemmArgsE"
)
SPLIT_K = "_ZN9fused_cna7kernels7split_kI13__nv_bfloat16EEvNS0_10SplitKArgsE"


def kernel(name: str, registers: int) -> CompiledKernel:
    code = (
        Instruction("LDSM.16"),
        Instruction("HMMA.16816.F32"),
        Instruction("BRA", is_conditional=True, targets=(4,)),
        Instruction("LDGSTS.E.64"),
        Instruction("BRA", is_conditional=True, targets=(0,)),
        Instruction("EXIT"),
    )
    return CompiledKernel(name, Resources(registers, 0, 0, 0, 0), LaunchBounds(128, 3), code)


def test_an_instantiation_is_read_from_its_name() -> None:
    gemm = gemm_kernel(GEMM)
    assert gemm == GemmKernel("implicit_gemm_sm80", "float16", 128, 32, 64, 6, 4, 1, 3, 8, "masked")
    assert (gemm.tile, gemm.threads, gemm.shared_bytes) == ("128x32x32", 128, 65024)
    assert gemm_kernel(SPLIT_K) is None


def test_a_row_of_the_kernel_report() -> None:
    row = gemm_row([kernel(GEMM, 120), kernel(GEMM, 180)])
    assert row is not None
    cells = dict(zip(HEADINGS, row, strict=True))
    assert cells["registers"] == "120 / 180"
    assert cells["blocks"] == "2", "shared memory limits it on an A100, registers on an H100"
    assert (cells["products"], cells["others"], cells["share"], cells["every turn"]) == (
        "1",
        "4",
        "20%",
        "25%",
    )
    assert gemm_row([kernel(SPLIT_K, 40)]) is None
    assert plain_row("split_k", [kernel(SPLIT_K, 40)] * 2)[:3] == ("split_k", "", "bfloat16")
    assert pair([3, 3]) == "3"


def test_the_table_prints_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    row = gemm_row([kernel(GEMM, 120), kernel(GEMM, 180)])
    assert row is not None
    print_table([row])
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in (*HEADINGS, *row))
