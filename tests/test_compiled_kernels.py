"""What the compiler can prove without a GPU: how every kernel comes out of nvcc."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.machine_code import (
    CUDA_CORES,
    TENSOR_CORES,
    Code,
    Instruction,
    count,
    innermost_loop,
    main_loop,
    parse_code,
)
from tests.sass import (
    CSRC,
    REGISTERS_PER_MULTIPROCESSOR,
    SHARED_BYTES_PER_MULTIPROCESSOR,
    SOURCES,
    Compiled,
    CompiledKernel,
    GemmKernel,
    LaunchBounds,
    Resources,
    compile_kernels,
    depthwise_kernel,
    find_disassembler,
    gemm_kernel,
    grouped_kernel,
    included_files,
    parse_launch_bounds,
    parse_resources,
    registers_of_a_block,
    resident_blocks,
    stem_kernel,
)

BLOCKS = {
    "depthwise_toeplitz": 3,
    "direct": 3,
    "small_m": 3,
    "split_k": 0,
}
"""The blocks a multiprocessor that a kernel file's launch bounds promise; tiles say it for the others."""

SCALAR_STORES = "|".join(
    (
        r"6direct.*4TileELi\d+ELi1ELi",
        r"7small_m",
    )
)
"""Kernels that store too few neighbouring channels for 16-byte accesses, by mangled name."""

GEMM_FILES = [source.stem for source in SOURCES if source.stem.startswith("implicit_gemm")]

TILED_FILES = [
    "stem",
    "depthwise",
    "grouped",
]
"""Other kernel files whose tiles say the blocks, as those of the implicit GEMM do."""

TILED_NAMES = (gemm_kernel, grouped_kernel, depthwise_kernel, stem_kernel)
"""What reads an instantiation of theirs from its name."""

TILE = re.compile(
    r"^ {4}\{(\d+), (\d+), (\d+), (\d+), (\d+), (\d+), (\d+)(, true)?(, true)?\},", re.MULTILINE
)
"""A row of an array of GemmTile in csrc/tiles.h."""


def listed_tiles(kernel: str) -> list[tuple[str, ...]]:
    """The rows of a kernel's array in csrc/tiles.h."""
    text = (CSRC / "tiles.h").read_text()
    return TILE.findall(text[text.index(f" {kernel}_tiles{{{{") :].partition("}};")[0])


MMA = {
    "float16": r"HMMA\.16816\.F32",
    "bfloat16": r"HMMA\.16816\.F32\.BF16",
    "float32": r"HMMA\.1688\.F32\.TF32",
}

COPIES = {
    16: r"LDGSTS\.E\.BYPASS\.LTC128B\.128",
    8: r"LDGSTS\.E(\.LTC128B)?\.64",
    4: r"LDGSTS\.E(\.LTC128B)?",
}
"""The opcode of cp.async by its bytes."""

LOADS = {16: r"LDG\.E\.128", 8: r"LDG\.E\.64", 4: r"LDG\.E", 2: r"LDG\.E\.U16"}
"""The opcode of a load by its bytes."""


every_kernel_file = pytest.mark.parametrize("source", [source.stem for source in SOURCES])
every_gemm_file = pytest.mark.parametrize("source", GEMM_FILES)
every_architecture = pytest.mark.parametrize("architecture", SHARED_BYTES_PER_MULTIPROCESSOR)
in_one_worker = pytest.mark.xdist_group("nvcc")


def gemms(compiled: Compiled, source: str, architecture: str) -> list[tuple[CompiledKernel, GemmKernel]]:
    """The instantiations of the implicit GEMM in a file."""
    found = [(kernel, gemm_kernel(kernel.name)) for kernel in compiled[source, architecture]]
    assert all(gemm is not None for _, gemm in found), "the names are mangled in another way than expected"
    return [(kernel, gemm) for kernel, gemm in found if gemm is not None]


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
def test_the_promised_blocks_have_registers_enough(
    compiled: Compiled, source: str, architecture: str
) -> None:
    for kernel in compiled[source, architecture]:
        tiled = next((found for read in TILED_NAMES if (found := read(kernel.name))), None)
        assert kernel.bounds.blocks == (tiled.blocks if tiled else BLOCKS[source]), kernel.name
        registers = max(kernel.bounds.blocks, 1) * registers_of_a_block(kernel)
        assert registers <= REGISTERS_PER_MULTIPROCESSOR, f"{kernel.name}: {registers} registers"
        assert kernel.resources.shared_bytes == 0, (
            f"{kernel.name}: static shared memory, which no plan counts"
        )


@pytest.mark.nvcc
@in_one_worker
@every_gemm_file
@every_architecture
def test_every_tile_is_compiled_as_the_plan_knows_it(
    compiled: Compiled, source: str, architecture: str
) -> None:
    found = gemms(compiled, source, architecture)
    listed = listed_tiles(found[0][1].kernel)
    assert len(listed) > 3
    expected = set()
    for *numbers, narrow, any_filter in listed:
        tile = tuple(map(int, numbers))
        expected |= {(*tile, 16, "masked"), (*tile, 16, "pointwise")}
        expected |= {(*tile, 8, "masked"), (*tile, 4, "masked")} if narrow else set()
        expected |= {(*tile, 4, "plain")} if any_filter else set()
    compiled_tiles = {
        (g.m, g.n, g.k_bytes, g.stages, g.warps_m, g.warps_n, g.blocks, g.access_bytes, g.rows)
        for _, g in found
    }
    assert compiled_tiles == expected
    for kernel, gemm in found:
        assert kernel.bounds.threads == gemm.threads, kernel.name
        assert source in (f"{gemm.kernel}_{gemm.dtype}", gemm.kernel)
        assert resident_blocks(kernel, gemm.shared_bytes, architecture) >= 1, kernel.name


@pytest.mark.nvcc
@in_one_worker
@every_kernel_file
@every_architecture
def test_memory_accesses(disassembled: Compiled, source: str, architecture: str) -> None:
    for kernel in disassembled[source, architecture]:
        local = kernel.count(r"(LDL|STL)\b.*")
        assert local == 0, f"{kernel.name} has {local} accesses to local memory"
        assert kernel.count(r"EXIT") >= 1, f"{kernel.name} was not disassembled"
        if not re.search(SCALAR_STORES, kernel.name):
            for opcode in (r"LDG\.E.*\.128.*", r"STG\.E.*\.128.*"):
                assert kernel.count(opcode) >= 1, f"{kernel.name} has no 16-byte {opcode[:3]}"


@pytest.mark.nvcc
@in_one_worker
@every_gemm_file
@every_architecture
def test_the_main_loop_is_products_fed_by_wide_copies(
    disassembled: Compiled, source: str, architecture: str
) -> None:
    for kernel, gemm in gemms(disassembled, source, architecture):
        loop = kernel.main_loop()
        if gemm.kernel == "implicit_gemm_fp32":
            products = gemm.m * gemm.n // gemm.threads * gemm.k_bytes // 4
            assert count(loop.every_turn, CUDA_CORES) == products, kernel.name
            assert kernel.count(TENSOR_CORES) == 0, f"{kernel.name} is not for tensor cores"
        else:
            products = gemm.m // gemm.warps_m // 16 * (gemm.n // gemm.warps_n // 8) * (gemm.k_bytes // 32)
            products *= 3 if gemm.kernel == "implicit_gemm_tf32x3" else 1
            assert count(loop.every_turn, MMA[gemm.dtype]) == products, kernel.name
            assert kernel.count(TENSOR_CORES) == products, f"{kernel.name} has others outside its main loop"
        copies = (gemm.m + gemm.n) * gemm.k_bytes // gemm.threads // gemm.access_bytes
        assert count(loop.all, COPIES[gemm.access_bytes]) == copies, kernel.name
        assert count(loop.all, r"LDGSTS.*") == copies, f"{kernel.name} has copies of another width"
        assert count(loop.all, r"(LDG|STG|LD|ST|STS)\b.*") == 0, (
            f"{kernel.name} has other accesses in its loop"
        )
        assert count(loop.every_turn, r"BAR\..*") == 1, f"{kernel.name} has more than a barrier a turn"


@pytest.mark.nvcc
@in_one_worker
@every_architecture
@pytest.mark.parametrize("rows", ["masked", "pointwise"])
def test_two_fifths_of_the_largest_main_loop_are_products(
    disassembled: Compiled, architecture: str, rows: str
) -> None:
    """Issued instructions of one turn, the copies included, which lie outside the loop's straight line."""
    kernels = gemms(disassembled, "implicit_gemm_sm80_float16", architecture)
    largest = max(gemm.m * gemm.n for _, gemm in kernels)
    for kernel, gemm in kernels:
        if gemm.m * gemm.n == largest and gemm.m > gemm.n and gemm.rows == rows:
            loop = kernel.main_loop()
            assert loop.share(TENSOR_CORES) >= 0.4, f"{gemm.tile}: {loop.families().most_common()}"


@pytest.mark.nvcc
@in_one_worker
@every_architecture
@pytest.mark.parametrize("rows", ["masked", "pointwise"])
def test_three_quarters_of_the_large_main_loops_in_float32_are_products(
    disassembled: Compiled, architecture: str, rows: str
) -> None:
    """One instruction a clock is all that the CUDA cores' peak allows, so this bounds the share of it."""
    kernels = gemms(disassembled, "implicit_gemm_fp32", architecture)
    large = [kernel for kernel, gemm in kernels if gemm.m * gemm.n >= 128 * 64 and gemm.rows == rows]
    assert len(large) == 2
    for kernel in large:
        loop = kernel.main_loop()
        assert loop.share(CUDA_CORES) >= 0.75, f"{kernel.name}: {loop.families().most_common()}"


def test_every_kernel_file_states_its_promise() -> None:
    assert {*BLOCKS, *GEMM_FILES, *TILED_FILES} == {source.stem for source in SOURCES}
    assert len(GEMM_FILES) == 5


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
        /*0030*/               @P2 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   EXIT ;
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


def test_instructions_are_read_from_the_listing() -> None:
    code = parse_code(LISTING)
    assert code == {
        "_Z1av": (
            Instruction("LDC"),
            Instruction("BRA", is_conditional=True, targets=(3,)),
            Instruction("UIADD3", is_conditional=True),
            Instruction("LDG.E.128.CONSTANT", is_conditional=True),
            Instruction("LDS", is_conditional=True),
            Instruction("EXIT"),
        ),
        "_Z1bv": (Instruction("STL.64"),),
    }
    assert count(code["_Z1bv"], r"(LDL|STL)\b.*") == 1
    assert count(code["_Z1bv"], "STL") == 0


def straight(text: str) -> Code:
    """Instructions by their opcodes; "BRA>3" jumps to number 3, "?BRA>3" where its predicate says so."""
    code = []
    for word in text.split():
        opcode, _, target = word.lstrip("?").partition(">")
        code.append(Instruction(opcode, word.startswith("?"), (int(target),) if target else ()))
    return tuple(code)


def test_a_loop_is_found_with_what_it_branches_out_to() -> None:
    #                    0   1    2     3     4     5          6      7      8       9     10
    code = straight("MOV BRA>5 LDG LDGSTS BRA>8 LDSM ?BRA>2 IADD HMMA.1 ?BRA>5 EXIT")
    loop = main_loop(code)
    assert " ".join(i.opcode for i in loop.all) == "LDG LDGSTS BRA LDSM BRA IADD HMMA.1 BRA"
    assert " ".join(i.opcode for i in loop.every_turn) == "LDSM BRA HMMA.1 BRA"
    assert loop.share(TENSOR_CORES) == 1 / 8
    assert loop.families()["BRA"] == 3


def test_the_loop_with_the_most_products_is_the_main_loop() -> None:
    code = straight("HMMA.1 ?BRA>0 MOV HMMA.1 HMMA.1 ?BRA>3 LDG ?BRA>6 EXIT")
    assert len(main_loop(code).all) == 3
    with pytest.raises(ValueError, match="no loop has"):
        main_loop(straight("HMMA.1 LDG ?BRA>1 EXIT"))


def test_the_innermost_loop_with_the_most_matches_is_found() -> None:
    #                    0   1   2     3   4   5   6       7       8   9
    code = straight("MOV LDG IADD LDG LDG LDS ?BRA>3 ?BRA>1 LDG ?BRA>8")
    assert " ".join(i.opcode for i in innermost_loop(code, "LDG")) == "LDG LDG LDS BRA"
    with pytest.raises(ValueError, match="no innermost loop has"):
        innermost_loop(code, "IADD")


def test_what_a_file_includes_is_followed(tmp_path: Path) -> None:
    include = tmp_path / "include"
    (include / "device").mkdir(parents=True)
    (tmp_path / "a.cu").write_text('#include <cmath>\n#include <device/b.h>\n#include "c.h"\n')
    (include / "device" / "b.h").write_text('#include "../d.h"\n')
    (tmp_path / "c.h").write_text('#include "c.h"\n')
    (include / "d.h").write_text("")
    (include / "not_included.h").write_text("")
    assert {path.name for path in included_files(tmp_path / "a.cu", include)} == {"a.cu", "b.h", "c.h", "d.h"}


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
    assert compile_kernels(source, "sm_80", CSRC, ["-std=c++20"], tmp_path / "out") == [kernel]
    source.write_text("int two() { return 2 }\n")
    with pytest.raises(RuntimeError, match="could not compile"):
        compile_kernels(source, "sm_80", CSRC, ["-std=c++20"], tmp_path / "out")
