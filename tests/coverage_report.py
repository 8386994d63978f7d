"""What no test reaches in the kernels and the plan: ``python -m tests.coverage_report``.

Compiles csrc/ for the simulator with gcov's counters, runs tests/coverage_cases.py and lists every line that
never ran and every branch that never went one of its ways. Each must be argued in ARGUED: the command fails
where one is not, and where an argument has lost its object.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.simt import build

IN_SCOPE = (
    "csrc/kernels/",
    "csrc/device/vector.cuh",
    *(f"csrc/plan/{name}.cpp" for name in ("cost", "families", "layout", "plan")),
)

NO_SUCH_TILE = "only where a plan had a tile or addressing that plan.cpp never makes"
NO_SUCH_DTYPE = "the plan gives a kernel the dtypes that it has; the line behind them is for the compiler"
NO_LAUNCH_ERROR = "the simulator launches whatever it is given; only a driver refuses"
NO_OLD_DEVICE = "every named device is 8.0 or newer; tests of the operator meet older ones"
EXCEPTIONS = "these ways clean up after an exception"
OPERATOR_ONLY = (
    "called by torch/operator.cpp alone, which needs torch: tests/test_operator.py and the GPU tests"
)
NO_SUCH_LAYOUT = (
    "maps are asked for only of x whose pixels the plan knows to be even, and of y that torch takes"
)
FULL_CACHE = "more maps than are kept: tests/test_hopper_kernel.py"
WHOLE_DEVICE = "a named device of 9.0 has it all; of one that lacks something, tests/test_hopper_kernel.py"
PYTHON_ONLY = "called by plan/module.cpp alone: tests/test_compiled_kernels.py"
INLINED = "the compiler's copies of an inlined function; one of them goes both ways"
CLAMPS = "the switch names every Activation; those that clamp are asked for before it"
FLOAT_NORMS = "the vectors of a float32 layer are float32"
MULTI_LINE = "gcov counts this statement on its following lines, which were reached"

TILES = {"list_tiles": PYTHON_ONLY}
OLD_DEVICE = {"if (!too_old(device).empty()) return too_old(device);": NO_OLD_DEVICE}

# By file, the text of a line, without the space around it, or the name of a function that nothing called.
ARGUED: dict[str, dict[str, str]] = {
    "csrc/kernels/common/activation.cuh": {
        "switch (activation.function) {": CLAMPS,
        "case Activation::identity:": CLAMPS,
        "case Activation::relu6: return;": CLAMPS,
    },
    "csrc/kernels/common/dispatch.cuh": {
        "switch (dtype) {": NO_SUCH_DTYPE,
        "return no_instantiation;": NO_SUCH_DTYPE,
        (
            "(void)((index == static_cast<int>(I) && "
            "(error = launch.template operator()<tiles[I]>(), true)) || ...);"
        ): NO_SUCH_TILE,
    },
    "csrc/kernels/common/epilogue.cuh": {
        "for (int i = 0; i < Rows * Width; ++i) values[i] += residual.value(i);": INLINED,
    },
    "csrc/kernels/common/fold.cuh": {
        (
            "if (exists && vector && is_float32) value.wide = static_cast<const float*>(vector)[channel];"
        ): FLOAT_NORMS,
        (
            "if (exists && vector && !is_float32) value.narrow = static_cast<const T*>(vector)[channel];"
        ): FLOAT_NORMS,
    },
    "csrc/kernels/depthwise/plan.cpp": TILES
    | {
        (
            'text += tile.by_value ? " by value" : " " + std::to_string(plan.vector_bytes) + "-byte";'
        ): EXCEPTIONS,
    },
    "csrc/kernels/depthwise_toeplitz/depthwise_toeplitz.cu": {"return no_instantiation;": NO_SUCH_DTYPE},
    "csrc/kernels/depthwise_toeplitz/plan.cpp": TILES | OLD_DEVICE,
    "csrc/kernels/direct/kernel.cuh": {
        "typename Shared<T, Traits>::Output output(args, shared.places, shared.folds,": MULTI_LINE,
    },
    "csrc/kernels/direct/plan.cpp": TILES,
    "csrc/kernels/grouped/plan.cpp": TILES
    | OLD_DEVICE
    | {
        "const double cycles = std::max({": MULTI_LINE,
        (
            "if (std::ranges::none_of(found, &Candidate::is_supported)) "
            "found = {*std::ranges::min_element(found, {}, needed)};"
        ): EXCEPTIONS,
    },
    "csrc/kernels/grouped/tile.h": {
        "bool operator==(const Choice&) const = default;": "choices that are compared are of one tile",
    },
    "csrc/kernels/implicit_gemm/launch.cuh": {
        (
            "if (const char* error = device::launch<implicit_gemm<Traits, Rows>>(shape, "
            "stream, args)) return error;"
        ): NO_LAUNCH_ERROR,
        (
            "if (addressing == Addressing::masked) "
            "return launch_kernel<Wide, gather::MaskedRows>(conv, plan, stream);"
        ): NO_SUCH_TILE,
        (
            "if (is_masked && plan.vector_bytes == 4) "
            "return launch_kernel<Quarter, gather::MaskedRows>(conv, plan, stream);"
        ): NO_SUCH_TILE,
        (
            "if (addressing == Addressing::plain) "
            "return launch_kernel<Quarter, gather::PlainRows>(conv, plan, stream);"
        ): NO_SUCH_TILE,
        "return no_instantiation;": NO_SUCH_TILE,
    },
    "csrc/kernels/implicit_gemm/plan.cpp": TILES
    | OLD_DEVICE
    | {
        (
            "const double step = std::max({tile.m * tile.n * k / rate, (operand_bytes + "
            "fragment_bytes) / shared_bytes_per_cycle,"
        ): MULTI_LINE,
    },
    "csrc/kernels/common/gather_rows.cuh": {
        "return position > first ? dilation.quotient(position - first - 1) + 1 : 0;": INLINED,
    },
    "csrc/kernels/implicit_gemm_sm90/epilogue.cuh": {
        "const device::Vector16 chunk = device::load_shared(address);": INLINED,
        "if (destination.template takes_vectors<width>()) {": INLINED,
        "for (int i = 0; i < width; ++i) {": INLINED,
        "if (i < valid) y[i * destination.stride] = parts[i];": INLINED,
    },
    "csrc/kernels/implicit_gemm_sm90/launch.cpp": {
        "switch (args.problem.dtype) {": NO_SUCH_DTYPE,
        'return "no storage type";': NO_SUCH_DTYPE,
    },
    "csrc/kernels/implicit_gemm_sm90/launch.cuh": {
        "find_map(x_geometry(args.conv, args.x_is_tiled, tile), args.x_map);": EXCEPTIONS,
        (
            "if (is_split && (Traits::is_pingpong || plan.blocks != int64_t{args.tiles} * args.split)) {"
        ): NO_SUCH_TILE,
        'return "blocks of a cluster share one tile each";': NO_SUCH_TILE,
        "if (plan.vector_bytes == 16 && !any_filter) {": NO_SUCH_TILE,
        (
            "if (!any_filter && plan.vector_bytes == 4) return launch_kernel<Quarter, "
            "gather::MaskedRows>(conv, plan, stream);"
        ): NO_SUCH_TILE,
        (
            "if (any_filter) return launch_kernel<Quarter, gather::PlainRows>(conv, plan, stream);"
        ): NO_SUCH_TILE,
        "return no_instantiation;": NO_SUCH_TILE,
    },
    "csrc/kernels/implicit_gemm_sm90/maps.cu": {
        "refused_maps": OPERATOR_ONLY,
        "has_tensor_maps": OPERATOR_ONLY,
        "if (map.strides[i] <= 0 || map.strides[i] % 16 != 0) return false;": NO_SUCH_LAYOUT,
        "if (!step) return std::nullopt;": NO_SUCH_LAYOUT,
        "if (!step || !is_dense || (p.gemm_m() > 1 && *step < p.k)) return std::nullopt;": NO_SUCH_LAYOUT,
        "static std::map<device::MapGeometry, device::TensorMap> maps;": EXCEPTIONS,
        "if (maps.size() >= most_maps) maps.clear();": FULL_CACHE,
    },
    "csrc/kernels/implicit_gemm_sm90/plan.cpp": {
        "list_tiles": PYTHON_ONLY,
        "if (device.compute_major != 9 || device.compute_minor != 0) {": WHOLE_DEVICE,
        'if (!device.has_hopper_code) return "the extension was not compiled for sm_90a";': WHOLE_DEVICE,
        "if (tile.shared_bytes(bytes) > device.shared_per_block) {": WHOLE_DEVICE,
        (
            'return with_numbers("it needs", tile.shared_bytes(bytes), " bytes of shared '
            'memory", device.shared_per_block);'
        ): WHOLE_DEVICE,
        'if (!device.has_tensor_maps) return "the driver does not encode tensor maps";': WHOLE_DEVICE,
        (
            'if (corner < least_corner || corner > most_corner) return outside("a corner", '
            "corner, least_corner, most_corner);"
        ): EXCEPTIONS,
    },
    "csrc/kernels/implicit_gemm_sm90/tile.h": {
        "const": PYTHON_ONLY,
    },
    "csrc/kernels/run.cpp": {
        "has_tensor_maps": OPERATOR_ONLY,
        "refused_tensor_maps": OPERATOR_ONLY,
    },
    "csrc/kernels/small_m/plan.cpp": TILES,
    "csrc/kernels/small_m/small_m.cu": {"return no_instantiation;": NO_SUCH_TILE},
    "csrc/kernels/stem/plan.cpp": TILES
    | OLD_DEVICE
    | {
        (
            "Candidate candidate{.plan = {.kernel = Kernel::stem, .choice = Choice{.tile = index}, "
            ".tile = {tile.m, tile.n, k}},"
        ): MULTI_LINE,
    },
    "csrc/plan/families.cpp": {
        'if (device.compute_major >= 8) return "";': NO_OLD_DEVICE,
        (
            'return "it needs compute capability 8.0, the device has " + '
            'std::to_string(device.compute_major) + "." +'
        ): NO_OLD_DEVICE,
        "std::to_string(device.compute_minor);": NO_OLD_DEVICE,
        (
            'return reach > limit ? with_numbers("it counts to", reach, " rows or columns", limit) : "";'
        ): EXCEPTIONS,
    },
    "csrc/plan/plan.cpp": {
        (
            'message += found == all.end() ? "; there are:" : ": " + found->unsupported_reason + '
            '"; legal are:";'
        ): EXCEPTIONS,
        "choose_plan_without_memory": OPERATOR_ONLY,
        "find_exact_plan": "called by tuned.cpp alone: tests/test_plan_file.py",
        "force_plan": OPERATOR_ONLY,
        "is_plan_forced": OPERATOR_ONLY,
        "memoised_plan": OPERATOR_ONLY,
    },
}


@dataclass
class Line:
    """What the instantiations of one line did, together: how often it ran, and each way of its branches.

    Instantiations with another number of branches, where a constant took some away, are kept apart.
    """

    runs: int = 0
    ways: dict[int, list[int]] = field(default_factory=dict)
    idle: int = 0  # instantiations in which it never ran

    def add(self, runs: int, ways: list[int]) -> None:
        self.runs += runs
        self.idle += runs == 0
        known = self.ways.setdefault(len(ways), [0] * len(ways))
        self.ways[len(ways)] = [a + b for a, b in zip(known, ways, strict=True)]

    def hole(self) -> str:
        """What is missing, in words; empty where nothing is."""
        if self.runs == 0:
            return "never ran"
        for ways in self.ways.values():
            if any(ways) and not all(ways):
                missed = ", ".join(str(i + 1) for i, way in enumerate(ways) if not way)
                return f"never went way {missed} of {len(ways)}"
        return ""


@dataclass
class Function:
    """A function, all its instantiations together."""

    name: str
    calls: int = 0


@dataclass
class File:
    """What gcov counted in a file: lines by number, functions by their first and last line."""

    lines: dict[int, Line] = field(default_factory=lambda: defaultdict(Line))
    functions: dict[tuple[int, int], Function] = field(default_factory=dict)


Coverage = dict[str, File]
"""By path, as in the tree."""


def read_counts(reports: Iterable[dict[str, Any]]) -> Coverage:
    """Merges what gcov printed as JSON for each object file."""
    found: Coverage = defaultdict(File)
    for report in reports:
        for file in report["files"]:
            name = os.path.normpath(file["file"])
            if not name.startswith(IN_SCOPE):
                continue
            for function in file["functions"]:
                extent = (function["start_line"], function["end_line"])
                known = found[name].functions.setdefault(
                    extent, Function(short_name(function["demangled_name"]))
                )
                known.calls += function["execution_count"]
            for line in file["lines"]:
                # ways that only an exception takes are the compiler's, not the source's
                ways = [branch["count"] for branch in line["branches"] if not branch["throw"]]
                found[name].lines[line["line_number"]].add(line["count"], ways)
    return found


def short_name(demangled: str) -> str:
    """The name of a function without its namespaces, types and arguments."""
    # arguments of templates and functions hold names of their own
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", demangled)) != demangled:
        demangled = shorter
    return demangled.split("::")[-1].split(" ")[-1].strip()


@dataclass(frozen=True)
class Hole:
    """A line, or a function that nothing called: `text` is the line or the function's name."""

    file: str
    number: int
    text: str
    missing: str


def find_holes(coverage: Coverage, root: Path) -> Iterator[Hole]:
    for path, file in sorted(coverage.items()):
        source = (root / path).read_text().splitlines()
        idle: set[int] = set()
        for (first, last), function in sorted(file.functions.items()):
            if function.calls == 0 and first not in idle:
                idle |= set(range(first, last + 1))
                yield Hole(path, first, function.name, "never called")
        for number, line in sorted(file.lines.items()):
            text, missing = source[number - 1].strip(), line.hole()
            # a closing brace stands for the destructors that run when an exception passes
            if missing and text != "}" and number not in idle:
                yield Hole(path, number, text, missing)


def complaints(holes: Collection[Hole], argued: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What has to be covered or argued, and which arguments have lost their object."""
    known = {(file, text) for file, texts in argued.items() for text in texts}
    unargued = [hole for hole in holes if (hole.file, hole.text) not in known]
    idle = known - {(hole.file, hole.text) for hole in holes}
    return [
        *(f"{hole.file}:{hole.number}: {hole.missing}: {hole.text}" for hole in unargued),
        *(f"{file}: argued, but reached or no longer there: {text}" for file, text in sorted(idle)),
    ]


def measure() -> Coverage:
    """Builds, runs the cases, and reads the counters."""
    build.build("conv_coverage")
    objects = build.FOLDER / build.COVERAGE.name / "objects"
    for old in objects.glob("*.gcda"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "tests.coverage_cases"], check=True, cwd=build.ROOT)
    with tempfile.TemporaryDirectory() as folder:
        return read_counts([_gcov(path, folder) for path in sorted(objects.glob("csrc_*.gcda"))])


def _gcov(counts: Path, folder: str) -> dict[str, Any]:
    command = [
        os.environ.get("GCOV", "gcov"),
        "--stdout",
        "--json-format",
        "--branch-probabilities",
        str(counts),
    ]
    printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    report: dict[str, Any] = json.loads(printed)
    return report


def main() -> int:
    coverage = measure()
    holes = list(find_holes(coverage, build.ROOT))
    for path, file in sorted(coverage.items()):
        reached = [line for line in file.lines.values() if line.runs]
        idle = sum(line.idle for line in reached)
        print(
            f"{path}: {len(reached)} of {len(file.lines)} lines ran, {idle} of their instantiations did not"
        )
    print("\nnever reached, for a reason:")
    for hole in holes:
        if reason := ARGUED.get(hole.file, {}).get(hole.text):
            print(f"  {hole.file}:{hole.number}: {hole.missing}: {hole.text}\n      {reason}")
    found = complaints(holes, ARGUED)
    print("\nneither reached nor argued:" if found else "\nnothing else is left out", *found, sep="\n  ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
