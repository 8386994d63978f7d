"""What reads the built extension: cubins, names, listings, loops and epilogues, on made-up kernels mostly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.epilogue_code import epilogue_turns, instructions_per_output
from tests.kernel_names import Instantiation
from tests.machine_code import (
    TENSOR_CORES,
    Code,
    Instruction,
    Scheduling,
    count,
    main_loop,
    parse_section,
    share,
)
from tests.sass import read_cubin, why_unreadable

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


def test_instructions_are_read_from_the_listing() -> None:
    code = parse_section(LISTING)
    assert code == (
        Instruction("LDC"),
        Instruction("BRA", is_conditional=True, targets=(5,)),
        Instruction("UIADD3", is_conditional=True),
        Instruction("CALL.REL.NOINC", is_conditional=True, targets=(5,)),
        Instruction("CALL.REL.NOINC"),
        Instruction("LDG.E.128.CONSTANT", is_conditional=True),
        Instruction("HADD2.F32", is_conditional=True),
        Instruction("DEPBAR.LE"),
        Instruction("EXIT"),
    )
    assert count(code, r"(LDG|LDC)\b.*") == 2
    assert count(code, "LDG") == 0


SCHEDULED = """\
        /*0010*/                   S2R R5, SR_TID.X ;
        /*2b20*/              @!P0 LDG.E.U16 R6, desc[UR28][R12.64] ;
        /*3ad0*/                   HADD2.F32 R4, -RZ, R4.H0_H0 ;
        /*4560*/                   DEPBAR.LE SB0, 0x4 ;
"""
ENCODING = """\
1979050000000000 00210000006e0e00
8189060c1c000000 00151e0c00620500
307204ff04000020 0041000000e20f02
1a79000000810000 0000000000c80f00
"""
"""As ptxas wrote them for sm_90a."""


def test_scheduling_is_read_from_the_encoding() -> None:
    assert [each.scheduling for each in parse_section(SCHEDULED, bytes.fromhex(ENCODING))] == [
        Scheduling(stall=7, result=1),
        Scheduling(stall=1, result=5, operands=2),
        Scheduling(stall=1, waits=((5, 0),)),
        Scheduling(stall=4, waits=((0, 4),)),
    ]
    with pytest.raises(ValueError, match="shorter"):
        parse_section(SCHEDULED, bytes(16))


GEMM = (
    "_ZN9fused_cna13implicit_gemm13implicit_gemmINS0_6TraitsI6__halfXtlNS0_4TileELi128ELi32ELi64ELi6ELi4ELi1ELi3ELb1"
    "ELb0EEELi8ENS0_11TensorCoresEEENS0_10MaskedRowsEEEvNS0_4ArgsE"
)
GROUPED = (
    "_ZN9fused_cna7grouped7groupedINS0_6TraitsI13__nv_bfloat16XtlNS0_4TileELNS0_6ReaderE1ELi1ELi4EEEEEEEvv"
)
SPLIT_K = "_ZN9fused_cna13implicit_gemm7split_kIfEEvNS0_10SplitKArgsE"


def test_an_instantiation_is_read_from_its_name() -> None:
    gemm, grouped, split_k = map(Instantiation.of, (GEMM, GROUPED, SPLIT_K))
    assert gemm == Instantiation("implicit_gemm_sm80", "float16", (128, 32, 64, 6, 4, 1, 3, 1, 0, 8, 1))
    assert (gemm.tile, gemm.rows, gemm.fields["access_bytes"]) == ("128x32x32", "masked", 8)
    assert grouped == Instantiation("grouped", "bfloat16", (1, 1, 4))
    assert split_k == Instantiation("split_k", "float32", ())


@pytest.mark.parametrize("name", [GEMM.replace("Li8E", ""), GROUPED.replace("grouped", "shuffle"), "_Z1av"])
def test_a_name_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown, or mangled"):
        Instantiation.of(name)


def straight(text: str) -> Code:
    """Instructions by their opcodes; "BRA>3" jumps to number 3, "?BRA>3" where its predicate says so."""
    code = []
    for word in text.split():
        opcode, _, target = word.lstrip("?").partition(">")
        code.append(Instruction(opcode, word.startswith("?"), (int(target),) if target else ()))
    return tuple(code)


def opcodes(code: Code) -> str:
    return " ".join(each.opcode for each in code)


def test_a_loop_is_found_with_what_it_branches_out_to() -> None:
    #                    0   1     2   3      4     5    6      7    8      9      10
    code = straight("MOV BRA>5 LDG LDGSTS BRA>8 LDSM ?BRA>2 IADD HMMA.1 ?BRA>5 EXIT")
    loop = main_loop(code, TENSOR_CORES)
    assert opcodes(loop) == "LDG LDGSTS BRA LDSM BRA IADD HMMA.1 BRA"
    assert share(loop, TENSOR_CORES) == 1 / 8


def test_the_loop_with_the_most_products_is_the_main_loop() -> None:
    code = straight("HMMA.1 ?BRA>0 MOV HMMA.1 HMMA.1 ?BRA>3 HMMA.1 HMMA.1 HMMA.1 STG.E ?BRA>6 EXIT")
    assert len(main_loop(code, TENSOR_CORES)) == 3
    with pytest.raises(ValueError, match="no loop has"):
        main_loop(straight("HMMA.1 LDG ?BRA>1 EXIT"), TENSOR_CORES)


def test_of_nested_loops_the_innermost_with_all_products_is_the_main_loop() -> None:
    #                    0   1    2   3    4    5    6       7    8       9    10      11
    code = straight("MOV BAR LDS FFMA LDS FFMA ?BRA>4 FADD ?BRA>3 LDG ?BRA>1 EXIT")
    assert opcodes(main_loop(code, "BAR")) == "BAR LDS FFMA LDS FFMA BRA FADD BRA LDG BRA"
    assert opcodes(main_loop(code, "FADD")) == "FFMA LDS FFMA BRA FADD BRA"
    assert opcodes(main_loop(code, "LDS|FADD")) == opcodes(main_loop(code, "BAR"))
    assert opcodes(main_loop(straight("STG.E LDS FFMA ?BRA>1 ?BRA>0 EXIT"), "FFMA")) == "LDS FFMA BRA"


LOADING = straight("MOV LDS.128 LDS ?BRA>6 LDG.E.128 FADD ?BRA>9 STG.E.128 BRA>1 STG.E.U16 BRA>1")
"""A loop that loads the residual where there is one, and stores value by value where it must."""

SKIPPING = straight("LDS.128 ?LDG.E.128 FADD STG.E.128 ?BRA>0 EXIT")
"""A loop with a load that a predicate skips."""

BRANCHING = straight(
    "LDS.128 ?BRA>5 LDS.128 LDS.128 LDS.128 ?BRA>10 DEPBAR.LE LDS.128 HADD2 MOV "
    "?BRA>15 LDGSTS.E.BYPASS.128 ?BRA>14 LDGSTS.E.BYPASS.128 LDGDEPBAR "
    "?BRA>17 STG.E.128 ?BRA>19 STG.E.128 ?BRA>0 EXIT"
)
"""Branches around new folds, the residual of this turn's two rows, copies for a later one, and each store."""


@pytest.mark.parametrize(
    ("code", "plain", "added"),
    [
        (LOADING, "BRA LDS.128 LDS BRA BRA STG.E.128", "BRA LDS.128 LDS BRA LDG.E.128 FADD BRA STG.E.128"),
        (SKIPPING, "BRA LDS.128 LDG.E.128 FADD STG.E.128", "BRA LDS.128 LDG.E.128 FADD STG.E.128"),
        (
            BRANCHING,
            "BRA STG.E.128 BRA LDS.128 BRA BRA BRA BRA STG.E.128",
            "BRA STG.E.128 BRA LDS.128 BRA BRA DEPBAR.LE LDS.128 HADD2 MOV "
            "BRA LDGSTS.E.BYPASS.128 BRA LDGSTS.E.BYPASS.128 LDGDEPBAR BRA STG.E.128",
        ),
        (straight("LDS.128 STG.E.U16 ?BRA>0 STG.E.128 EXIT"), "", ""),
    ],
)
def test_a_turn_of_the_epilogue(code: Code, plain: str, added: str) -> None:
    assert [opcodes(turn) for turn in epilogue_turns(code)] == [plain, added]


def test_a_turn_is_measured_by_what_it_stores() -> None:
    assert instructions_per_output(epilogue_turns(LOADING)[0], value_bytes=2) == 6 / 8
    assert instructions_per_output(straight("LDS STG.E.128 STG.E.128"), value_bytes=4) == 3 / 8


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
    assert (kernel.registers, kernel.threads) == (32, 1024)
    assert kernel.stack_bytes > 0
    assert kernel.shared_bytes == 4096
    assert kernel.count(r"(LDL|STL)\b.*") > 0
