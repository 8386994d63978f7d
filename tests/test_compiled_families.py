"""What the compiler made of the kernels beside the implicit GEMM, each with the promises of its own."""

from __future__ import annotations

from tests.kernel_names import DepthwiseKernel, GroupedKernel, SmallMKernel, StemKernel, ToeplitzKernel
from tests.machine_code import TENSOR_CORES, count, innermost_loop, main_loop
from tests.sass import Compiled
from tests.test_compiled_kernels import COPIES, MMA

LOADS = {16: r"LDG\.E\.128", 8: r"LDG\.E\.64", 4: r"LDG\.E", 2: r"LDG\.E\.U16"}
"""The opcode of a load by its bytes."""


def test_small_m_streams_with_all_loads_of_a_step_under_way(compiled: Compiled) -> None:
    for kernel in compiled["small_m"]:
        small_m = SmallMKernel.of(kernel.name)
        loop = main_loop(kernel.code, LOADS[small_m.access_bytes])
        loads_of_a_chunk = 16 // small_m.access_bytes
        loads = small_m.chunks * (small_m.rows + small_m.channels) * loads_of_a_chunk
        assert count(loop.all, LOADS[small_m.access_bytes]) == loads, kernel.name
        assert count(loop.all, r"LDG\..*") == loads, f"{kernel.name} has loads of another width"
        assert count(loop.all, r"(STG|ST|STS|BAR|SHFL)\b.*") == 0, (
            f"{kernel.name} waits for others in its loop"
        )
        products = small_m.chunks * small_m.values * small_m.rows * small_m.channels
        assert count(loop.all, r"FFMA.*") == products, kernel.name
        # the first filters are under way before the first barrier
        barrier = next(i for i, each in enumerate(kernel.code) if each.opcode.startswith("BAR"))
        ahead = count(kernel.code[:barrier], LOADS[small_m.access_bytes])
        assert ahead >= small_m.chunks * small_m.channels * loads_of_a_chunk, kernel.name


def test_depthwise_toeplitz_multiplies_on_tensor_cores(compiled: Compiled) -> None:
    """Two channels a warp, each filter row of a pass times the four rows of a strip, and nothing twice."""
    made = [ToeplitzKernel.of(kernel.name) for kernel in compiled["depthwise_toeplitz"]]
    assert set(made) == {ToeplitzKernel(dtype, rows) for dtype in ("float16", "bfloat16") for rows in (5, 7)}
    for kernel, toeplitz in zip(compiled["depthwise_toeplitz"], made, strict=True):
        rows = toeplitz.filter_rows
        assert kernel.count(MMA[toeplitz.dtype]) == kernel.count(TENSOR_CORES) == 2 * 4 * rows, kernel.name
        assert kernel.count(r"LDSM\.16\.M88\.4") == 2 * (rows + 3), kernel.name
        loop = main_loop(kernel.code)
        assert loop.share(TENSOR_CORES) >= 0.28, f"{kernel.name}: {loop.families().most_common()}"


def test_narrow_groups_take_fragments_straight_from_the_halo(compiled: Compiled) -> None:
    """A step of a warp: four fragments of x, each used by all blocks of columns; no copies, no barriers."""
    for kernel in compiled["grouped"]:
        grouped = GroupedKernel.of(kernel.name)
        loop = main_loop(kernel.code)
        columns = grouped.column_blocks
        assert count(loop.every_turn, MMA[grouped.dtype]) == 4 * columns, kernel.name
        by_matrices, by_words = 4 + columns // 2, 1 + columns % 2 * 2
        if grouped.reader == 1:
            by_matrices, by_words = 0, 4 * 4 + 2 + 2
        assert count(loop.every_turn, r"LDSM\..*M88\.4") == by_matrices, kernel.name
        assert count(loop.every_turn, r"LDS\b.*") <= by_words, kernel.name
        assert count(loop.all, r"(LDG|LDGSTS|STG|LD|ST|STS|BAR)\b.*") == 0, kernel.name
        # of the halo and of the weights
        assert kernel.count(COPIES[16]) >= 2, kernel.name


def test_a_filter_row_loads_every_column_once(compiled: Compiled) -> None:
    """And multiplies it into every output that needs it: the loop over the rows of 3x3, 5x5 and 7x7."""
    for kernel in compiled["depthwise"]:
        made = DepthwiseKernel.of(kernel.name)
        if made.filter == 0 or made.access_bytes < 16:
            continue
        loop = innermost_loop(kernel.code, r"LDS\.128")
        products = 7 * made.filter * made.values
        columns = 6 * made.stride + made.filter
        weights = made.filter * made.values // 4
        assert count(loop, r"LDG\.E.*\.128.*") == count(loop, r"LDG\..*") == columns, kernel.name
        assert count(loop, r"LDS\.128") == count(loop, r"LDS.*") == weights, kernel.name
        assert count(loop, r"(STG|STS|BAR)\b.*") == 0, kernel.name
        assert count(loop, "FFMA.*") >= products, kernel.name
        if made.stride == 1:
            assert products / len(loop) >= {3: 0.44, 5: 0.53, 7: 0.57}[made.filter], kernel.name


def test_the_main_loop_of_the_stem_gathers_and_multiplies(compiled: Compiled) -> None:
    for kernel in compiled["stem"]:
        stem = StemKernel.of(kernel.name)
        loop = innermost_loop(kernel.code, TENSOR_CORES)
        fragments = stem.m // stem.warps // 16
        products = fragments * (stem.n // 8)
        assert count(loop, MMA[stem.dtype]) == kernel.count(TENSOR_CORES) == products, kernel.name
        # both words' taps by one load, two words of each pixel, and weights by ldmatrix
        assert count(loop, r"LDS\.128") <= 1, kernel.name
        assert count(loop, r"LDS") <= fragments * 4, kernel.name
        assert count(loop, r"LDSM\..*") == stem.n // 16, kernel.name
        assert count(loop, r"(LDG|STG|LD|ST|STS|BAR)\b.*") == 0, kernel.name
        least = 0.28 if fragments * stem.n == 128 else 0.13
        assert products / len(loop) > least, f"{kernel.name}: {products} of {len(loop)}"
