"""Compiles kernel files with nvcc and reads the result: resources, launch bounds, machine instructions.

What comes out is kept under build/sass/, by the content of everything that went in.
"""

from __future__ import annotations

import hashlib
import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.machine_code import COPIES, CUDA_CORES, TENSOR_CORES, Code, Loop, count, main_loop, parse_code

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "kernels").glob("*.cu"))
CACHE = ROOT / "build" / "sass"
PROCESSES = 2


@dataclass(frozen=True)
class Resources:
    """What ``ptxas -v`` says of one kernel. Shared memory is the static one; ptxas knows no other."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class LaunchBounds:
    """``__launch_bounds__``: threads a block, and blocks that must fit a multiprocessor (0: not said)."""

    threads: int
    blocks: int


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, by mangled name, for one architecture. ``code`` is None without a disassembler."""

    name: str
    resources: Resources
    bounds: LaunchBounds
    code: Code | None

    def main_loop(self) -> Loop:
        """The loop that copies the operands ahead."""
        assert self.code is not None
        return main_loop(self.code, COPIES)

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode, modifiers included, that ``pattern`` matches as a whole."""
        assert self.code is not None
        return count(self.code, pattern)


def parse_resources(log: str) -> dict[str, Resources]:
    """Resources by mangled name, from what nvcc prints with ``-Xptxas -v``."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'([^']+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if name is None or frame is None or used is None:
            raise ValueError(f"ptxas printed something else than expected: {part[:300]!r}")
        stack, stores, loads = map(int, frame.groups())
        found[name[1]] = Resources(int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0)
    return found


def parse_launch_bounds(ptx: str) -> dict[str, LaunchBounds]:
    """Launch bounds by mangled name, from PTX."""
    found: dict[str, LaunchBounds] = {}
    for part in re.split(r"^\.visible \.entry ", ptx, flags=re.MULTILINE)[1:]:
        name, head = part[: part.index("(")], part[: part.index("{")]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        if threads is None:
            raise ValueError(f"{name} has no __launch_bounds__")
        x, y, z = (int(extent or 1) for extent in threads.groups())
        found[name] = LaunchBounds(x * y * z, int(blocks[1]) if blocks else 0)
    return found


@cache
def find_disassembler() -> str | None:
    """nvdisasm of the toolkit on PATH, or the one that triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.is_file() else None


def included_files(source: Path, include: Path) -> set[Path]:
    """The source and every file that it includes, those of the system left out."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE):
            candidates = (path.parent / name, include / name)
            waiting += [file.resolve() for file in candidates if file.is_file()][:1]
    return found


def compile_kernels(
    source: Path, architecture: str, include: Path, flags: list[str], cache_folder: Path = CACHE
) -> list[CompiledKernel]:
    """Compiles one .cu file for an architecture such as ``sm_90a`` and reads every kernel in it.

    Args:
        flags: nvcc's, as the build uses them.
        cache_folder: where the results are kept for the next time.

    Raises:
        RuntimeError: it does not compile. Has all that nvcc printed.
    """
    folder = cache_folder / f"{source.stem}-{architecture}-{_digest(source, architecture, include, flags)}"
    if not folder.exists():
        _compile(source, architecture, include, flags, folder)
    resources = parse_resources((folder / "log").read_text())
    bounds = parse_launch_bounds((folder / "ptx").read_text())
    code: dict[str, Code] = {}
    if disassembler := find_disassembler():
        listing = subprocess.run(
            [disassembler, "-c", str(folder / "cubin")], capture_output=True, check=True, text=True
        )
        code = parse_code(listing.stdout)
    return [
        CompiledKernel(name, resources[name], bounds[name], code[name] if code else None)
        for name in resources
    ]


def _digest(source: Path, architecture: str, include: Path, flags: list[str]) -> str:
    digest = hashlib.sha256(repr((architecture, flags, _compiler_version())).encode())
    for path in sorted(included_files(source, include)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _compiler_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, check=True, text=True).stdout


def _compile(source: Path, architecture: str, include: Path, flags: list[str], folder: Path) -> None:
    """Leaves the log, the PTX and the machine code in ``folder``, which appears only when all are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = f"-gencode=arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        kept, result = Path(temporary, "kept"), Path(temporary, "result")
        kept.mkdir()
        result.mkdir()
        intermediate = ["--keep", "--keep-dir", str(kept)]
        command = ["nvcc", "-cubin", target, *flags, f"-I{include}", "-Xptxas", "-v", *intermediate]
        done = subprocess.run(
            [*command, str(source), "-o", str(result / "cubin")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"nvcc could not compile {source} for {architecture}:\n{done.stdout}")
        (result / "log").write_text(done.stdout)
        (kept / f"{source.stem}.ptx").rename(result / "ptx")
        try:
            result.rename(folder)
        except OSError:
            # another process was faster, with the same result
            if not folder.exists():
                raise
    for old in folder.parent.glob(f"{source.stem}-{architecture}-*"):
        if old != folder:
            # another process may be removing it too
            shutil.rmtree(old, ignore_errors=True)


Compiled = dict[tuple[str, str], list[CompiledKernel]]
"""Kernels by the name of their file, without its ending, and architecture."""


def compile_all(architectures: Iterable[str]) -> Compiled:
    """Every kernel file for every architecture, with the flags of the build, two compilers at a time."""
    flags: list[str] = runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"]
    # the files that take longest first
    sources = sorted(SOURCES, key=lambda source: "gemm" not in source.stem)
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = list(pool.map(lambda job: compile_kernels(job[0], job[1], CSRC, flags), jobs))
    return {
        (source.stem, architecture): found
        for (source, architecture), found in zip(jobs, results, strict=True)
    }


@dataclass(frozen=True)
class GemmKernel:
    """An instantiation of the implicit GEMM: what its mangled name says of it."""

    kernel: str
    dtype: str
    m: int
    n: int
    k_bytes: int
    stages: int
    warps_m: int
    warps_n: int
    blocks: int
    access_bytes: int
    rows: str

    @property
    def products(self) -> str:
        """The opcode of its multiply-adds, as a pattern."""
        return CUDA_CORES if self.kernel == "implicit_gemm_fp32" else TENSOR_CORES

    @property
    def value_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def tile(self) -> str:
        """As the plan prints it."""
        return f"{self.m}x{self.n}x{self.k_bytes // self.value_bytes}"

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * 32

    @property
    def shared_bytes(self) -> int:
        """GemmTile::shared_bytes of csrc/tiles.h, and what the kernel may add to it for alignment."""
        return self.stages * (self.m + self.n) * self.k_bytes + self.m * 24 + self.n * 12 + 128


_DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_GEMM = re.compile(
    r"13implicit_gemmINS0_18ImplicitGemmTraitsI(?P<dtype>f|6__half|13__nv_bfloat16)XtlNS_8GemmTileE"
    r"(?P<tile>(?:L[ib]\d+E)+)EELi(?P<access>\d+)ENS0_\d+(?P<arithmetic>[A-Z][A-Za-z]+)EEE"
    r"NS0_\d+(?P<rows>[A-Z][a-z]+)Rows"
)

_KERNEL_OF_ARITHMETIC = {
    "TensorCores": "implicit_gemm_sm80",
    "CompensatedTensorCores": "implicit_gemm_tf32x3",
    "CudaCores": "implicit_gemm_fp32",
}


def gemm_kernel(name: str) -> GemmKernel | None:
    """What a mangled name says, or None where it is another kernel's."""
    match = _GEMM.search(name)
    if match is None:
        return None
    tile = [int(number) for number in re.findall(r"L[ib](\d+)E", match["tile"])]
    kernel = _KERNEL_OF_ARITHMETIC[match["arithmetic"]]
    return GemmKernel(kernel, _DTYPES[match["dtype"]], *tile[:7], int(match["access"]), match["rows"].lower())


@dataclass(frozen=True)
class SmallMKernel:
    """An instantiation of small_m: what its mangled name says of it."""

    dtype: str
    rows: int
    channels: int
    unroll: int
    access_bytes: int
    is_pointwise: bool

    @property
    def values(self) -> int:
        """Of a 16-byte chunk."""
        return 4 if self.dtype == "float32" else 8

    @property
    def chunks(self) -> int:
        """SmallMTile::unroll_of of csrc/tiles.h: of every row and filter, in a step of one lane."""
        return 1 if self.access_bytes <= 4 else self.unroll


_SMALL_M = re.compile(
    r"12SmallMTraitsI(?P<dtype>f|6__half|13__nv_bfloat16)XtlNS_10SmallMTileE"
    r"(?P<tile>(?:Li\d+E){3})EELi(?P<access>\d+)ELb(?P<pointwise>[01])E"
)


def small_m_kernel(name: str) -> SmallMKernel | None:
    """What a mangled name says, or None where it is another kernel's."""
    match = _SMALL_M.search(name)
    if match is None:
        return None
    tile = [int(number) for number in re.findall(r"Li(\d+)E", match["tile"])]
    return SmallMKernel(_DTYPES[match["dtype"]], *tile, int(match["access"]), match["pointwise"] == "1")


@dataclass(frozen=True)
class GroupedKernel:
    """An instantiation of grouped: what its mangled name says of it."""

    dtype: str
    reader: str
    column_blocks: int
    blocks: int


_GROUPED = re.compile(
    r"7groupedINS0_13GroupedTraitsI(?P<dtype>f|6__half|13__nv_bfloat16)XtlNS_11GroupedTileELNS_11GroupReaderE"
    r"(?P<reader>\d)ELi(?P<columns>\d)ELi(?P<blocks>\d)E"
)


def grouped_kernel(name: str) -> GroupedKernel | None:
    """What a mangled name says, or None where it is another kernel's."""
    match = _GROUPED.search(name)
    if match is None:
        return None
    reader = ("chunks", "words")[int(match["reader"])]
    return GroupedKernel(_DTYPES[match["dtype"]], reader, int(match["columns"]), int(match["blocks"]))


@dataclass(frozen=True)
class DepthwiseKernel:
    """An instantiation of depthwise: what its mangled name says of it. A filter of 0 is any."""

    dtype: str
    filter: int
    stride: int
    blocks: int
    by_value: bool
    access_bytes: int

    @property
    def values(self) -> int:
        """Channels of a chunk."""
        return 4 if self.dtype == "float32" else 8

    @property
    def shared_bytes(self) -> int:
        """DepthwiseTile::shared_bytes of csrc/tiles.h."""
        taps = self.filter**2 or 32
        return 7 * self.values * 128 * 4 + taps * (8 * self.values + 4) * 4 + 8 * self.values * 12


_DEPTHWISE = re.compile(
    r"9depthwiseINS0_15DepthwiseTraitsI(?P<dtype>f|6__half|13__nv_bfloat16)XtlNS_13DepthwiseTileE"
    r"(?P<tile>(?:L[ib]\d+E)+)EELi(?P<access>\d+)E"
)


def depthwise_kernel(name: str) -> DepthwiseKernel | None:
    """What a mangled name says, or None where it is another kernel's."""
    match = _DEPTHWISE.search(name)
    if match is None:
        return None
    filter_size, stride, blocks, by_value = map(int, re.findall(r"L[ib](\d+)E", match["tile"]))
    return DepthwiseKernel(
        _DTYPES[match["dtype"]], filter_size, stride, blocks, bool(by_value), int(match["access"])
    )


@dataclass(frozen=True)
class StemKernel:
    """An instantiation of stem: what its mangled name says of it."""

    dtype: str
    m: int
    n: int
    warps: int
    blocks: int

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def tile(self) -> str:
        """As the plan prints it."""
        return f"{self.m}x{self.n}x{8 if self.dtype == 'float32' else 16}"


_STEM = re.compile(
    r"4stemINS0_10StemTraitsI(?P<dtype>f|6__half|13__nv_bfloat16)XtlNS_8StemTileE(?P<tile>(?:Li\d+E)+)EE"
)


def stem_kernel(name: str) -> StemKernel | None:
    """What a mangled name says, or None where it is another kernel's."""
    match = _STEM.search(name)
    if match is None:
        return None
    return StemKernel(_DTYPES[match["dtype"]], *map(int, re.findall(r"Li(\d+)E", match["tile"])))


REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
SHARED_BYTES_PER_MULTIPROCESSOR = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
SYSTEM_SHARED_BYTES = 1024
"""What the system takes of a multiprocessor's shared memory for each block."""


def registers_of_a_block(kernel: CompiledKernel) -> int:
    """Registers are given out to a warp in units of 256."""
    return -(-kernel.resources.registers * 32 // 256) * 256 * (kernel.bounds.threads // 32)


def resident_blocks(kernel: CompiledKernel, shared_bytes: int, architecture: str) -> int:
    """How many blocks a multiprocessor holds at once, each with so much dynamic shared memory."""
    shared = shared_bytes + kernel.resources.shared_bytes + SYSTEM_SHARED_BYTES
    return min(
        REGISTERS_PER_MULTIPROCESSOR // registers_of_a_block(kernel),
        THREADS_PER_MULTIPROCESSOR // kernel.bounds.threads,
        SHARED_BYTES_PER_MULTIPROCESSOR[architecture] // shared,
    )
