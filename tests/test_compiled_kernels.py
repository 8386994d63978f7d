"""What the compiler can prove without a GPU: how every kernel came out in the built extension."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest

from tests.epilogue_code import WIDE_COPIES, WIDE_LOADS, WIDE_STORES, epilogue_turns
from tests.kernel_names import (
    DTYPES,
    KINDS,
    DepthwiseKernel,
    DirectKernel,
    GemmKernel,
    GroupedKernel,
    Instantiation,
    SmallMKernel,
    StemKernel,
)
from tests.machine_code import CUDA_CORES, TENSOR_CORES, count, main_loop
from tests.sass import (
    REGISTERS_PER_MULTIPROCESSOR,
    ROOT,
    Compiled,
    CompiledKernel,
    registers_of_a_block,
    resident_blocks,
)

GEMMS = {family: TENSOR_CORES for family, kind in KINDS.items() if kind is GemmKernel}
GEMMS["implicit_gemm_fp32"] = CUDA_CORES
"""The opcodes of their products."""

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

every_family = pytest.mark.parametrize("family", KINDS)
every_gemm = pytest.mark.parametrize("family", GEMMS)


def listed_tiles(name: str) -> list[list[int]]:
    """The rows of an array of csrc/tiles.h; true is 1, and of enumerators the number."""
    text = (ROOT / "csrc" / "tiles.h").read_text()
    array = re.search(rf" {name}_tiles\{{\{{(.*?)\}}\}};", text, re.DOTALL)
    assert array is not None, f"csrc/tiles.h has no {name}_tiles"
    words = {"true": 1, "GroupReader::chunks": 0, "GroupReader::words": 1}
    rows = re.findall(r"\{([^{}]+)", array[1])
    assert len(rows) > 2
    return [[words[word] if word in words else int(word) for word in row.split(", ")] for row in rows]


def gemms(dtype: str, tile: list[int]) -> Iterable[Instantiation]:
    narrow, any_filter = (*tile[7:], 0, 0)[:2]
    kinds = [(16, "masked"), (16, "pointwise")]
    kinds += [(8, "masked"), (4, "masked")] * narrow + [(4, "plain")] * any_filter
    return [GemmKernel(dtype, *tile[:7], *kind) for kind in kinds]


def small_ms(dtype: str, tile: list[int]) -> Iterable[Instantiation]:
    kinds = [(16, True), (16, False), (8, False), (4, False), (2, False)]
    return [SmallMKernel(dtype, *tile, *kind) for kind in kinds if kind[0] > 2 or dtype != "float32"]


def depthwises(dtype: str, tile: list[int]) -> Iterable[Instantiation]:
    by_value = len(tile) > 3
    return [DepthwiseKernel(dtype, *tile[:3], by_value, access) for access in ((0,) if by_value else (16, 4))]


INSTANTIATIONS: dict[str, Callable[[str, list[int]], Iterable[Instantiation]]] = {
    **dict.fromkeys(GEMMS, gemms),
    "small_m": small_ms,
    "depthwise": depthwises,
    "grouped": lambda dtype, tile: [GroupedKernel(dtype, *tile)],
    "stem": lambda dtype, tile: [StemKernel(dtype, *tile)],
}
"""What csrc must instantiate for a dtype and a tile."""


@pytest.mark.parametrize("family", INSTANTIATIONS)
def test_every_tile_is_compiled_as_the_plan_knows_it(compiled: Compiled, family: str) -> None:
    dtypes = ["float32"] if family in ("implicit_gemm_fp32", "implicit_gemm_tf32x3") else DTYPES.values()
    tiles = listed_tiles(family)
    expected = {made for dtype in dtypes for tile in tiles for made in INSTANTIATIONS[family](dtype, tile)}
    found = [KINDS[family].of(kernel.name) for kernel in compiled[family]]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_no_kernel_is_unknown(compiled: Compiled) -> None:
    assert compiled.keys() == KINDS.keys()


@every_family
def test_nothing_is_kept_in_local_or_static_shared_memory(compiled: Compiled, family: str) -> None:
    for kernel in compiled[family]:
        assert kernel.resources.stack_bytes == 0, f"{kernel.name} spills"
        assert kernel.count(r"(LDL|STL)\b.*") == 0, f"{kernel.name} spills"
        assert kernel.resources.shared_bytes == 0, f"{kernel.name}: no plan counts static shared memory"
        assert kernel.count("EXIT") >= 1, f"{kernel.name} was not disassembled"


@every_family
def test_the_promised_blocks_fit_a_multiprocessor(compiled: Compiled, family: str) -> None:
    for kernel in compiled[family]:
        made = KINDS[family].of(kernel.name)
        assert kernel.resources.threads == made.threads, kernel.name
        registers = made.blocks * registers_of_a_block(kernel)
        assert registers <= REGISTERS_PER_MULTIPROCESSOR, f"{kernel.name}: {registers} registers"
        if isinstance(made, DepthwiseKernel):
            assert resident_blocks(kernel, made.shared_bytes) >= made.blocks, kernel.name
        if isinstance(made, GemmKernel):
            assert resident_blocks(kernel, made.shared_bytes) >= 1, kernel.name


@pytest.mark.parametrize("family", [family for family in KINDS if family != "small_m"])
def test_the_epilogue_takes_16_bytes_at_a_time(compiled: Compiled, family: str) -> None:
    """Residual and output, in one loop or in an only turn; not where a thread finishes fewer channels."""
    for kernel in compiled[family]:
        if family == "direct" and DirectKernel.of(kernel.name).n < 8:
            continue
        assert kernel.count(WIDE_STORES) >= 1, f"{kernel.name} stores no 16 bytes"
        assert kernel.count(f"{WIDE_LOADS}|{WIDE_COPIES}") >= 1, f"{kernel.name} loads no 16 bytes"
        plain, with_residual = epilogue_turns(kernel.code)
        assert plain or family not in GEMMS, f"{kernel.name} has no loop that stores 16 bytes"
        assert with_residual or not plain, f"{kernel.name} has none that also loads 16 bytes of a residual"


def made_gemms(compiled: Compiled, family: str) -> list[tuple[CompiledKernel, GemmKernel]]:
    return [(kernel, GemmKernel.of(kernel.name)) for kernel in compiled[family]]


@every_gemm
def test_the_main_loop_is_products_fed_by_wide_copies(compiled: Compiled, family: str) -> None:
    for kernel, gemm in made_gemms(compiled, family):
        loop = main_loop(kernel.code, GEMMS[family])
        if family == "implicit_gemm_fp32":
            products = gemm.m * gemm.n // gemm.threads * gemm.k_bytes // 4
            assert count(loop.every_turn, CUDA_CORES) == products, kernel.name
            assert kernel.count(TENSOR_CORES) == 0, f"{kernel.name} is not for tensor cores"
        else:
            products = gemm.m // gemm.warps_m // 16 * (gemm.n // gemm.warps_n // 8) * (gemm.k_bytes // 32)
            products *= 3 if family == "implicit_gemm_tf32x3" else 1
            assert count(loop.every_turn, MMA[gemm.dtype]) == products, kernel.name
            assert count(loop.all, TENSOR_CORES) == products, f"{kernel.name} has products of another kind"
        copies = (gemm.m + gemm.n) * gemm.k_bytes // gemm.threads // gemm.access_bytes
        assert count(loop.all, COPIES[gemm.access_bytes]) == copies, kernel.name
        assert count(loop.all, r"LDGSTS.*") == copies, f"{kernel.name} has copies of another width"
        assert count(loop.all, r"(LDG|STG|LD|ST|STS)\b.*") == 0, (
            f"{kernel.name} has other accesses in its loop"
        )
        assert count(loop.every_turn, r"BAR\..*") == 1, f"{kernel.name} has more than a barrier a turn"


@pytest.mark.parametrize("rows", ["masked", "pointwise"])
def test_about_two_fifths_of_the_largest_main_loop_are_products(compiled: Compiled, rows: str) -> None:
    """Issued instructions of one turn, the copies included, which lie outside the loop's straight line."""
    kernels = made_gemms(compiled, "implicit_gemm_sm80")
    wanted = ("float16", 256, 128, rows)
    largest = [kernel for kernel, gemm in kernels if (gemm.dtype, gemm.m, gemm.n, gemm.rows) == wanted]
    assert largest
    for kernel in largest:
        loop = main_loop(kernel.code, TENSOR_CORES)
        assert loop.share(TENSOR_CORES) >= 0.39, f"{kernel.name}: {loop.families().most_common()}"


@pytest.mark.parametrize("rows", ["masked", "pointwise"])
def test_three_quarters_of_the_large_main_loops_in_float32_are_products(
    compiled: Compiled, rows: str
) -> None:
    """One instruction a clock is all that the CUDA cores' peak allows, so this bounds the share of it."""
    kernels = made_gemms(compiled, "implicit_gemm_fp32")
    large = [kernel for kernel, gemm in kernels if gemm.m * gemm.n >= 128 * 64 and gemm.rows == rows]
    assert large
    for kernel in large:
        loop = main_loop(kernel.code, CUDA_CORES)
        assert loop.share(CUDA_CORES) >= 0.75, f"{kernel.name}: {loop.families().most_common()}"
