"""What the compiler can prove without a GPU: how every kernel comes out of nvcc."""

from __future__ import annotations

import re
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sass import (
    CompiledKernel,
    LaunchBounds,
    Resources,
    compile_kernels,
    find_disassembler,
    parse_launch_bounds,
    parse_opcodes,
    parse_resources,
)

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "kernels").glob("*.cu"))

# Per multiprocessor: registers, and shared memory that blocks can use, a kilobyte a block being the system's.
REGISTERS = 65536
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
SYSTEM_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Promise:
    """What a kernel file promises, so that its plans fit the machine and its memory accesses are wide.

    ``blocks`` is how many are to run on a multiprocessor at once, each with at most ``shared_bytes``.
    Kernels whose mangled name matches ``scalar`` store too few neighbouring channels for 16-byte accesses.
    """

    blocks: int
    shared_bytes: int
    scalar: str


PROMISES = {"direct": Promise(blocks=3, shared_bytes=48 * 1024, scalar=r"4TileELi\d+ELi1ELi")}

Compiled = dict[tuple[str, str], list[CompiledKernel]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Every kernel file compiled for every architecture, with the flags of the build."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, and there is none on PATH")
    flags: list[str] = runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"]
    folder = tmp_path_factory.mktemp("nvcc")
    return {
        (source.stem, architecture): compile_kernels(
            source, architecture, CSRC, flags, folder / f"{source.stem}-{architecture}"
        )
        for source in SOURCES
        for architecture in SHARED_BYTES
    }


every_kernel_file = pytest.mark.parametrize("source", [source.stem for source in SOURCES])
every_architecture = pytest.mark.parametrize("architecture", SHARED_BYTES)
in_one_worker = pytest.mark.xdist_group("nvcc")


@pytest.mark.nvcc
@in_one_worker
@every_kernel_file
@every_architecture
def test_no_kernel_spills(compiled: Compiled, source: str, architecture: str) -> None:
    kernels = compiled[source, architecture]
    assert kernels
    for kernel in kernels:
        resources = kernel.resources
        spilled = resources.stack_bytes + resources.spill_store_bytes + resources.spill_load_bytes
        assert spilled == 0, f"{kernel.name} keeps values in local memory: {resources}"


@pytest.mark.nvcc
@in_one_worker
@every_kernel_file
@every_architecture
def test_planned_blocks_fit_a_multiprocessor(compiled: Compiled, source: str, architecture: str) -> None:
    promise = PROMISES[source]
    for kernel in compiled[source, architecture]:
        assert kernel.bounds.blocks == promise.blocks, kernel.name
        # Registers are given out to a warp in units of 256.
        registers_per_warp = -(-kernel.resources.registers * 32 // 256) * 256
        registers = promise.blocks * (kernel.bounds.threads // 32) * registers_per_warp
        assert registers <= REGISTERS, f"{kernel.name}: {promise.blocks} blocks need {registers} registers"
        shared = promise.shared_bytes + kernel.resources.shared_bytes + SYSTEM_SHARED_BYTES
        assert promise.blocks * shared <= SHARED_BYTES[architecture], f"{kernel.name}: {shared} bytes a block"


@pytest.mark.nvcc
@in_one_worker
@every_kernel_file
@every_architecture
def test_memory_accesses(compiled: Compiled, source: str, architecture: str) -> None:
    if find_disassembler() is None:
        pytest.skip("needs nvdisasm, of the CUDA toolkit or of the triton package")
    for kernel in compiled[source, architecture]:
        local = kernel.count(r"(LDL|STL)\b.*")
        assert local == 0, f"{kernel.name} has {local} accesses to local memory"
        assert kernel.count(r"EXIT") >= 1, f"{kernel.name} was not disassembled"
        if not re.search(PROMISES[source].scalar, kernel.name):
            for opcode in (r"LDG\.E.*\.128.*", r"STG\.E.*\.128.*"):
                assert kernel.count(opcode) >= 1, f"{kernel.name} has no 16-byte {opcode[:3]}"


def test_every_kernel_file_states_its_promise() -> None:
    assert set(PROMISES) == {source.stem for source in SOURCES}


PTXAS_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""

LISTING = """\
//--------------------- .text._Z1av  --------------------------
\t.section\t.text._Z1av,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_0:
        /*0030*/              @P2  LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/                   EXIT ;
\t.section\t.text._Z1bv,"ax",@progbits
        /*0000*/                   STL.64 [R1], R4 ;
"""


def test_resources_are_read_from_the_log() -> None:
    assert parse_resources(PTXAS_LOG) == {
        "_Z1av": Resources(168, 16, 4, 8, 1024),
        "_Z1bv": Resources(32, 0, 0, 0, 0),
    }
    with pytest.raises(ValueError, match="something else than expected"):
        parse_resources("Compiling entry function '_Z1av' for 'sm_80'\n")


def test_launch_bounds_are_read_from_ptx() -> None:
    ptx = ".visible .entry _Z1av(\n\t.param .u64 p\n)\n.maxntid 64, 2, 1\n.minnctapersm 3\n{\n\tret;\n}\n"
    assert parse_launch_bounds(ptx) == {"_Z1av": LaunchBounds(128, 3)}
    assert parse_launch_bounds(ptx.replace(".minnctapersm 3\n", "")) == {"_Z1av": LaunchBounds(128, 0)}
    with pytest.raises(ValueError, match="_Z1av has no __launch_bounds__"):
        parse_launch_bounds(".visible .entry _Z1av(\n)\n{\n}\n.maxntid 64\n")


def test_opcodes_are_read_from_the_listing() -> None:
    opcodes = parse_opcodes(LISTING)
    assert opcodes == {"_Z1av": ("LDC", "BRA", "UIADD3", "LDG.E.128.CONSTANT", "EXIT"), "_Z1bv": ("STL.64",)}
    kernel = CompiledKernel("b", Resources(32, 0, 0, 0, 0), LaunchBounds(32, 0), opcodes["_Z1bv"])
    assert kernel.count(r"(LDL|STL)\b.*") == 1
    assert kernel.count("STL") == 0


@pytest.mark.nvcc
@in_one_worker
def test_a_spilling_kernel_is_seen(tmp_path: Path) -> None:
    """A planted fault: sixty values live at once, in a kernel held to a few registers by its bounds."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, and there is none on PATH")
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* p) {\n"
        "    float v[60];\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 60; ++i) v[i] = p[i * 7];\n"
        "    __syncthreads();\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 60; ++i) p[i * 5] = v[i] * v[59 - i];\n"
        "}\n"
    )
    (kernel,) = compile_kernels(source, "sm_80", CSRC, ["-std=c++20"], tmp_path / "out")
    assert kernel.bounds == LaunchBounds(1024, 2)
    assert kernel.resources.spill_store_bytes > 0
    if find_disassembler() is not None:
        assert kernel.count(r"(LDL|STL)\b.*") > 0
