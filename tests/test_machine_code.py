"""What reads the built extension: cubins, listings, and the loops in a kernel's instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cubin import read_sections
from tests.kernel_names import KINDS, GemmKernel, GroupedKernel, SplitKKernel, family_of
from tests.machine_code import (
    TENSOR_CORES,
    Code,
    Instruction,
    count,
    innermost_loop,
    main_loop,
    parse_section,
)
from tests.sass import extract_cubins, find_extension, read_cubin, why_unreadable

LISTING = """\
_Z1av,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0030*/               @P1 CALL.REL.NOINC `(.L_x_0) ;
        /*0040*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
.L_x_0:
        /*0050*/               @P2 LDG.E.128.CONSTANT R140, [R142.64] ;
        /*0060*/              @!PT HADD2.F32 R3, -RZ, R140.reuse.H0_H0 ;
        /*0070*/                   DEPBAR.LE SB0, 0x1 ;
        /*0080*/                   EXIT ;
"""
NO_BARRIERS, SETS_BARRIER_5, WAITS_FOR_BARRIER_5 = 0x000FC80000000000, 0x000F64000C1E1D00, 0x120FE40000004100
"""Upper halves of instructions as nvdisasm -hex prints them."""


def test_instructions_are_read_from_the_listing() -> None:
    upper_halves = [NO_BARRIERS] * 5 + [SETS_BARRIER_5, WAITS_FOR_BARRIER_5] + [NO_BARRIERS] * 2
    code = parse_section(LISTING, b"".join(bytes(8) + half.to_bytes(8, "little") for half in upper_halves))
    assert code == (
        Instruction("LDC"),
        Instruction("BRA", is_conditional=True, targets=(5,)),
        Instruction("UIADD3", is_conditional=True),
        Instruction("CALL.REL.NOINC", is_conditional=True, targets=(5,)),
        Instruction("CALL.REL.NOINC"),
        Instruction("LDG.E.128.CONSTANT", is_conditional=True, barrier=5),
        Instruction("HADD2.F32", is_conditional=True, waits=1 << 5),
        Instruction("DEPBAR.LE", leaves=1),
        Instruction("EXIT"),
    )
    assert count(code, r"(LDG|LDC)\b.*") == 2
    assert count(code, "LDG") == 0


GEMM = (
    "_ZN9fused_cna7kernels13implicit_gemmINS0_18ImplicitGemmTraitsI6__halfXtlNS_8GemmTileELi128ELi32ELi64ELi6ELi4E"
    "Li1ELi3ELb1ELb0EEELi8ENS0_11TensorCoresEEENS0_10MaskedRowsEEEvNS0_16ImplicitGemmArgsE"
)
GROUPED = (
    "_ZN9fused_cna7kernels7groupedINS0_13GroupedTraitsI13__nv_bfloat16XtlNS_11GroupedTileELNS_11GroupReaderE1E"
    "Li2ELi3EEEEEEEvNS0_11GroupedArgsE"
)
SPLIT_K = "_ZN9fused_cna7kernels7split_kIfEEvNS0_10SplitKArgsE"


def test_an_instantiation_is_read_from_its_name() -> None:
    families = {name: family_of(name) for name in (GEMM, GROUPED, SPLIT_K)}
    assert list(families.values()) == ["implicit_gemm_sm80", "grouped", "split_k"]
    gemm, grouped, split_k = (KINDS[family].of(name) for name, family in families.items())
    assert gemm == GemmKernel("float16", 128, 32, 64, 6, 4, 1, 3, 8, "masked")
    assert (gemm.tile, gemm.threads, gemm.shared_bytes) == ("128x32x32", 128, 64000)
    assert grouped == GroupedKernel("bfloat16", 1, 2, 3)
    assert split_k == SplitKKernel("float32")


def straight(text: str) -> Code:
    """Instructions by their opcodes.

    "BRA>3" jumps to number 3, "?BRA>3" where its predicate says so. "LDG+5" releases barrier 5, "FADD-5"
    waits for it, and "DEPBAR=3" leaves 3 groups of copies under way.
    """
    code = []
    for word in text.split():
        opcode, sign, number = re.split(r"([>+=-]|$)", word.lstrip("?"), maxsplit=1)
        fields = {
            "": {},
            ">": {"targets": (int(number or 0),)},
            "+": {"barrier": int(number or 0)},
            "-": {"waits": 1 << int(number or 0)},
            "=": {"leaves": int(number or 0)},
        }
        code.append(Instruction(opcode, word.startswith("?"), **fields[sign]))
    return tuple(code)


def test_a_loop_is_found_with_what_it_branches_out_to() -> None:
    #                    0   1     2   3      4     5    6      7    8      9      10
    code = straight("MOV BRA>5 LDG LDGSTS BRA>8 LDSM ?BRA>2 IADD HMMA.1 ?BRA>5 EXIT")
    loop = main_loop(code)
    assert " ".join(i.opcode for i in loop.all) == "LDG LDGSTS BRA LDSM BRA IADD HMMA.1 BRA"
    assert " ".join(i.opcode for i in loop.every_turn) == "LDSM BRA HMMA.1 BRA"
    assert loop.share(TENSOR_CORES) == 1 / 8
    assert loop.families()["BRA"] == 3


def test_the_loop_with_the_most_products_is_the_main_loop() -> None:
    code = straight("HMMA.1 ?BRA>0 MOV HMMA.1 HMMA.1 ?BRA>3 HMMA.1 HMMA.1 HMMA.1 STG.E ?BRA>6 EXIT")
    assert len(main_loop(code).all) == 3
    with pytest.raises(ValueError, match="no loop has"):
        main_loop(straight("HMMA.1 LDG ?BRA>1 EXIT"))


def test_the_innermost_loop_with_the_most_matches_is_found() -> None:
    #                    0   1   2     3   4   5   6       7       8   9
    code = straight("MOV LDG IADD LDG LDG LDS ?BRA>3 ?BRA>1 LDG ?BRA>8")
    assert " ".join(i.opcode for i in innermost_loop(code, "LDG")) == "LDG LDG LDS BRA"
    with pytest.raises(ValueError, match="no innermost loop has"):
        innermost_loop(code, "IADD")


SPILLS = """\
__global__ void __launch_bounds__(1024, 2) spills(float* p) {
    __shared__ float first[1024];
    first[threadIdx.x] = p[threadIdx.x];
    float v[60];
#pragma unroll
    for (int i = 0; i < 60; ++i) v[i] = p[i * 7];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 60; ++i) p[i * 5] = v[i] * v[59 - i] + first[i];
}
"""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_spilling_kernel_is_seen(tmp_path: Path, architecture: str) -> None:
    """A planted fault: sixty values live at once, in a kernel held to a few registers by its bounds."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, and there is none on PATH")
    if reason := why_unreadable(tmp_path):
        pytest.skip(reason)
    source, cubin = tmp_path / "spills.cu", tmp_path / "spills.cubin"
    source.write_text(SPILLS)
    subprocess.run(["nvcc", "-cubin", f"-arch={architecture}", source, "-o", cubin], check=True)
    (kernel,) = read_cubin(cubin, architecture)
    assert (kernel.resources.registers, kernel.resources.threads) == (32, 1024)
    assert kernel.resources.stack_bytes > 0
    assert kernel.resources.shared_bytes == 4096
    assert kernel.count(r"(LDL|STL)\b.*") > 0


def test_cubins_are_extracted_once_for_a_content(tmp_path: Path) -> None:
    extension = find_extension()
    if reason := why_unreadable(extension):
        pytest.skip(reason)
    assert extension is not None
    folder = extract_cubins(extension, tmp_path)
    marked = folder / "marked"
    marked.touch()
    assert extract_cubins(extension, tmp_path) == folder
    assert marked.exists()
    assert all(file.read_bytes()[:4] == b"\x7fELF" for file in folder.glob("*.cubin"))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "something temporary was left behind"


def test_another_file_is_no_cubin() -> None:
    with pytest.raises(ValueError, match="no 64-bit ELF"):
        read_sections(b"#!/bin/sh\n")
