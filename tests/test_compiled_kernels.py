"""What the compiler can prove without a GPU: how every kernel came out in the built extension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.epilogue_code import WIDE_COPIES, WIDE_LOADS, WIDE_STORES, epilogue_turns
from tests.kernel_names import FAMILIES, VALUE_BYTES, Fields, planned
from tests.machine_code import COPIES, LOADS, TENSOR_CORES, WARPGROUP_TENSOR_CORES, count, positions, share
from tests.sass import (
    REGISTERS_PER_MULTIPROCESSOR,
    Compiled,
    CompiledKernel,
    registers_of_a_block,
    resident_blocks,
)

MMA = {
    TENSOR_CORES: {
        "float16": r"HMMA\.16816\.F32",
        "bfloat16": r"HMMA\.16816\.F32\.BF16",
        "float32": r"HMMA\.1688\.F32\.TF32",
    },
    WARPGROUP_TENSOR_CORES: {
        "float16": r"HGMMA\.64x{n}x16\.F32",
        "bfloat16": r"HGMMA\.64x{n}x16\.F32\.BF16",
        "float32": r"HGMMA\.64x{n}x8\.F32\.TF32",
    },
}
"""Of the products on tensor cores by dtype, with the tile's columns where they say them."""

BARRIERS = r"BAR\b.*"
ACCESSES = r"(LDG|LDGSTS|STG|LD|ST|STS|ATOM\w*|RED|SHFL)\b.*"
"""Of memory, fragments read from shared memory left out, and of other threads' registers."""

every_family = pytest.mark.parametrize("family", FAMILIES)


def kernels_of(compiled: Compiled, family: str) -> list[CompiledKernel]:
    """A family's kernels; for a target that they are not for they are compiled to a stop."""
    kernels = compiled[family]
    if kernels[0].architecture not in FAMILIES[family].architectures:
        for kernel in kernels:
            opcodes = {each.opcode for each in kernel.code}
            assert opcodes <= {"BPT.TRAP", "MOV", "EXIT", "BRA", "NOP"}, kernel.name
        pytest.skip(f"it is for {' and '.join(FAMILIES[family].architectures)} alone")
    return kernels


@dataclass(frozen=True)
class MainLoop:
    """A turn for one thread: products, and the bytes that instructions like ``reads`` bring, if any."""

    products: Callable[[Fields], int]
    reads: str = ""
    read_bytes: Callable[[Fields], int] = lambda f: 0
    barriers: int = 0


def gemm(products: Callable[[Fields], int]) -> MainLoop:
    return MainLoop(products, COPIES, lambda f: (f["m"] + f["n"]) * f["k_bytes"] // gemm_threads(f), 1)


def gemm_threads(f: Fields) -> int:
    return f["warps_m"] * f["warps_n"] * 32


def gemm_mma(f: Fields) -> int:
    return f["m"] // f["warps_m"] // 16 * (f["n"] // f["warps_n"] // 8) * (f["k_bytes"] // 32)


def small_m_chunks(f: Fields) -> int:
    return 1 if f["access_bytes"] <= 4 else f["unroll"]


MAIN_LOOPS = {
    "implicit_gemm_sm80": gemm(gemm_mma),
    # of 64 rows and all columns each; a single warpgroup or two share the rows, or take turns
    "implicit_gemm_sm90": MainLoop(lambda f: 4 * (f["m"] // 64) // (2 if f["schedule"] == 1 else 1)),
    "implicit_gemm_tf32x3": gemm(lambda f: 3 * gemm_mma(f)),
    "implicit_gemm_fp32": gemm(lambda f: f["m"] * f["n"] // gemm_threads(f) * f["k"]),
    "stem": MainLoop(lambda f: f["m"] // f["warps"] // 16 * (f["n"] // 8)),
    # each of four fragments of x used by all blocks of columns
    "grouped": MainLoop(lambda f: 4 * f["column_blocks"]),
    # a filter row times the four rows of a strip
    "depthwise_toeplitz": MainLoop(lambda f: 4 * f["filter_rows"]),
    # a filter row, or one tap of any, and seven outputs: every column that they need is loaded once
    "depthwise": MainLoop(
        lambda f: 7 * max(f["filter"], 1) * f["values"],
        LOADS,
        lambda f: 16 * (6 * f["stride"] + f["filter"] if f["filter"] else 7),
    ),
    "small_m": MainLoop(
        lambda f: small_m_chunks(f) * f["values"] * f["rows"] * f["channels"],
        LOADS,
        lambda f: 16 * small_m_chunks(f) * (f["rows"] + f["channels"]),
    ),
}
"""Of all kernels but direct, which any layer may use and none should, and split_k."""

# fmt: off
MINIMUM_SHARES = {
    "implicit_gemm_sm80": {
        (256, 128, 64): (0.39, 0.18), (128, 256, 64): (0.40, 0.18), (128, 128, 64): (0.37, 0.175),
        (128, 128, 128): (0.34, 0.155), (256, 64, 64): (0.25, 0.115), (128, 64, 64): (0.24, 0.125),
        (128, 32, 64): (0.145, 0.08), (64, 64, 128): (0.215, 0.105), (64, 64, 64): (0.165, 0.09),
    },
    "implicit_gemm_tf32x3": {(192,): (0, 0.12), (96,): (0, 0.12), (128,): (0, 0.105), (64,): (0, 0.105)},
    "implicit_gemm_fp32": {
        (128, 128): (0, 0.78), (128, 64): (0, 0.77), (128, 32): (0, 0.70), (64, 64): (0, 0.72),
    },
    "stem": {
        (256, 64): (0.28, 0.28), (128, 64): (0.28, 0.28), (64, 64): (0.22, 0.22),
        (256, 32): (0.18, 0.18), (128, 32): (0.18, 0.18), (64, 32): (0.145, 0.145),
    },
    "grouped": {
        (0, 1): (0.085, 0.046), (0, 2): (0.16, 0.088), (0, 3): (0.21, 0.115), (0, 4): (0.265, 0.14),
        (1, 1): (0.044, 0.029),
    },
    "depthwise_toeplitz": {(5,): (0.27, 0), (7,): (0.305, 0)},
    "depthwise": {
        (3, 1): (0.45, 0.425), (5, 1): (0.53, 0.57), (7, 1): (0.57, 0.61), (0, 0): (0.24, 0.235),
        (3, 2): (0.345, 0.40), (5, 2): (0.43, 0.485), (7, 2): (0.485, 0.54),
    },
    "small_m": {(1,): (0.195, 0.18), (4,): (0.335, 0.295), (8,): (0.26, 0.21)},
}
# fmt: on
"""Of products among the instructions of the main loop, in 16 bits and in float32, by the tile's first fields.

About five in a hundred less than at this writing, with loads of 16 bytes; of small_m for filters of one tap.
"""

MOST_WAITS = {
    "implicit_gemm_sm80": (1, 1),
    "implicit_gemm_tf32x3": (1, 1),
    "implicit_gemm_fp32": (1, 1),
    "implicit_gemm_sm90": (1, 1),
    "stem": (3,),
    "grouped": (1,),
    "depthwise": (4, 7),
    "depthwise_toeplitz": (2,),
    "small_m": (1, 31),
    "direct": (6,),
    "split_k": (1,),
}
"""Of loads from memory in series before the first product: with accesses of 16 bytes, with narrower ones."""

WIDTHS = {"128": 16, "64": 8, "U16": 2}


def width(opcode: str) -> int:
    """The bytes of an access."""
    return next((WIDTHS[part] for part in opcode.split(".") if part in WIDTHS), 4)


def test_every_kernel_is_compiled(compiled: Compiled) -> None:
    assert compiled.keys() == FAMILIES.keys()


@every_family
def test_every_tile_is_compiled_as_the_plan_knows_it(compiled: Compiled, family: str) -> None:
    assert Counter(kernel.made for kernel in kernels_of(compiled, family)) == Counter(planned(family).keys())


@every_family
def test_nothing_is_kept_in_local_or_static_shared_memory(compiled: Compiled, family: str) -> None:
    for kernel in kernels_of(compiled, family):
        assert kernel.stack_bytes == 0, f"{kernel.name} spills"
        assert kernel.count(r"(LDL|STL)\b.*") == 0, f"{kernel.name} spills"
        assert kernel.shared_bytes == 0, f"{kernel.name}: no plan counts static shared memory"
        assert kernel.count("EXIT") >= 1, f"{kernel.name} was not disassembled"


@every_family
def test_the_promised_blocks_fit_a_multiprocessor(compiled: Compiled, family: str) -> None:
    """By their registers; by their shared memory those of depthwise, and one of the others."""
    blocks = planned(family)
    for kernel in kernels_of(compiled, family):
        promised = kernel.made.fields["blocks"]
        threads, *shared_bytes = blocks[kernel.made]
        assert kernel.threads == threads, kernel.name
        registers = promised * registers_of_a_block(kernel)
        assert registers <= REGISTERS_PER_MULTIPROCESSOR, f"{kernel.name}: {registers} registers"
        resident = resident_blocks(kernel, sum(shared_bytes))
        assert resident >= (promised if family == "depthwise" else 1), f"{kernel.name}: {resident} blocks"


@every_family
def test_the_epilogue_takes_16_bytes_at_a_time(compiled: Compiled, family: str) -> None:
    """Residual and output, in one loop or in an only turn; not where a thread finishes fewer channels."""
    for kernel in kernels_of(compiled, family):
        assert kernel.count(r"(LDG|STG|LDS|STS)\..*[US]8\b.*") == 0, f"{kernel.name} takes a value in parts"
        if family == "small_m" or (family == "direct" and kernel.made.fields["n"] < 8):
            continue
        assert kernel.count(WIDE_STORES) >= 1, f"{kernel.name} stores no 16 bytes"
        assert kernel.count(f"{WIDE_LOADS}|{WIDE_COPIES}") >= 1, f"{kernel.name} loads no 16 bytes"
        plain, with_residual = epilogue_turns(kernel.code)
        if family == "implicit_gemm_sm90":
            continue  # its output goes by bulk copies where it can
        assert plain or "gemm" not in family, f"{kernel.name} has no loop that stores 16 bytes"
        assert with_residual or not plain, f"{kernel.name} has none that also loads 16 bytes of a residual"


@every_family
def test_products_are_made_where_they_should_be(compiled: Compiled, family: str) -> None:
    for kernel in kernels_of(compiled, family):
        mma = MMA.get(kernel.products, {}).get(kernel.made.dtype, "none").format(**kernel.made.fields)
        on_tensor_cores = kernel.count(TENSOR_CORES) + kernel.count(WARPGROUP_TENSOR_CORES)
        assert on_tensor_cores == kernel.count(mma), f"{kernel.name} has products of another kind"
        assert kernel.count(kernel.products) >= 1, f"{kernel.name} has no products"


@pytest.mark.parametrize("family", MAIN_LOOPS)
def test_a_turn_of_the_main_loop_is_what_the_tile_says(compiled: Compiled, family: str) -> None:
    promise = MAIN_LOOPS[family]
    for kernel in kernels_of(compiled, family):
        fields, loop = kernel.made.fields, kernel.main_loop
        assert count(loop, kernel.products) == promise.products(fields), kernel.name
        bytes_at_once = fields.get("access_bytes") or VALUE_BYTES[kernel.made.dtype]
        reads = promise.read_bytes(fields) // bytes_at_once
        widths = Counter(width(loop[i].opcode) for i in positions(loop, promise.reads))
        assert widths == ({bytes_at_once: reads} if reads else {}), kernel.name
        assert count(loop, ACCESSES) == reads, f"{kernel.name} has other accesses in its loop"
        assert count(loop, BARRIERS) == promise.barriers, kernel.name
        bypasses = reads if promise.reads == COPIES and bytes_at_once == 16 else 0
        assert count(loop, r"LDGSTS\b.*\.BYPASS\b.*") == bypasses, f"{kernel.name} copies through the L1"


@pytest.mark.parametrize("family", MINIMUM_SHARES)
def test_products_have_their_share_of_the_main_loop(compiled: Compiled, family: str) -> None:
    """Of the instructions that a turn issues. An entry that no tile has is one too many."""
    minimums, found = MINIMUM_SHARES[family], set()
    for kernel in kernels_of(compiled, family):
        fields, arguments = kernel.made.fields, kernel.made.arguments
        if fields.get("access_bytes", 16) < 16 or not fields.get("is_pointwise", True):
            continue
        tile = next((tile for tile in minimums if arguments[: len(tile)] == tile), None)
        assert tile is not None, f"{kernel.name} needs an entry in MINIMUM_SHARES"
        found.add(tile)
        minimum = minimums[tile][VALUE_BYTES[kernel.made.dtype] == 4]
        actual = share(kernel.main_loop, kernel.products)
        assert actual >= minimum > 0, f"{kernel.name}: {actual:.3f} of {len(kernel.main_loop)}"
    assert found == minimums.keys()


@every_family
def test_few_loads_follow_one_another_before_the_first_product(compiled: Compiled, family: str) -> None:
    """Each that is asked for only once the one before is there adds a round trip to memory to a launch."""
    for kernel in kernels_of(compiled, family):
        is_wide = kernel.made.fields.get("access_bytes", 16) == 16
        most = MOST_WAITS[family][0 if is_wide else 1]
        first = kernel.first_product
        assert 1 <= first.loads <= most, f"{kernel.name}: {first}"


def test_products_of_warpgroups_run_while_their_threads_go_on(compiled: Compiled) -> None:
    """A step starts its products at once and waits for those of the step before; a compiler that could not
    see to that would wait for each. Operands and output go by bulk copies, registers change hands."""
    for kernel in kernels_of(compiled, "implicit_gemm_sm90"):
        loop = kernel.main_loop
        assert count(loop, r"WARPGROUP\.ARRIVE\b.*") == 1, f"{kernel.name} serializes its products"
        assert count(loop, r"WARPGROUP\.DEPBAR\b.*") == 1, f"{kernel.name} serializes its products"
        assert len(loop) <= 120, f"{kernel.name}: {len(loop)} instructions for a step"
        for opcode in (r"UTMALDG\.4D\.IM2COL", r"UTMALDG\.2D", r"UTMALDG\.3D", r"UTMASTG\.3D"):
            assert kernel.count(opcode) >= 1, f"{kernel.name} has no {opcode}"
        if VALUE_BYTES[kernel.made.dtype] == 2:
            assert kernel.count(r"STSM\.16\.M88\.4\b.*") >= 1, kernel.name
        assert (kernel.count(COPIES) > 0) == (kernel.made.fields["m"] < 256), f"{kernel.name}: its gather"
        assert kernel.count(r"USETMAXREG\b.*") == (2 if kernel.threads > 256 else 0), kernel.name


def test_operands_are_asked_for_ahead(compiled: Compiled) -> None:
    """small_m's first filters before the first barrier; halo and weights of grouped by copies of 16 bytes."""
    for kernel in compiled["small_m"]:
        fields = kernel.made.fields
        ahead = kernel.code[: positions(kernel.code, BARRIERS)[0]]
        loads = [i for i in positions(ahead, LOADS) if width(ahead[i].opcode) == fields["access_bytes"]]
        needed = 16 * small_m_chunks(fields) * fields["channels"]
        assert len(loads) * fields["access_bytes"] >= needed, kernel.name
    for kernel in compiled["grouped"]:
        before = kernel.code[: positions(kernel.code, TENSOR_CORES)[0]]
        assert count(before, WIDE_COPIES) >= 2, kernel.name
