"""What the compiler made of the kernels beside the implicit GEMM, each with the promises of its own."""

from __future__ import annotations

import re

import pytest

from tests.machine_code import TENSOR_CORES, count, innermost_loop, main_loop
from tests.sass import (
    CSRC,
    Compiled,
    CompiledKernel,
    SmallMKernel,
    StemKernel,
    depthwise_kernel,
    grouped_kernel,
    resident_blocks,
    small_m_kernel,
    stem_kernel,
)
from tests.test_compiled_kernels import COPIES, LOADS, MMA, every_architecture, in_one_worker

DEPTHWISE_TILE = re.compile(r"^ {4}\{(\d), (\d), (\d)(, true)?\},", re.MULTILINE)
"""A row of depthwise_tiles in csrc/tiles.h."""

STEM_TILE = re.compile(r"^ {4}\{(\d+), (\d+), (\d+), (\d+)\},", re.MULTILINE)
"""A row of stem_tiles in csrc/tiles.h."""

GROUPED_TILE = re.compile(r"^ {4}\{GroupReader::(\w+), (\d+), (\d+)\},", re.MULTILINE)
"""A row of grouped_tiles in csrc/tiles.h."""


def small_ms(compiled: Compiled, architecture: str) -> list[tuple[CompiledKernel, SmallMKernel]]:
    """The instantiations of small_m."""
    found = [(kernel, small_m_kernel(kernel.name)) for kernel in compiled["small_m", architecture]]
    assert all(small_m is not None for _, small_m in found), (
        "the names are mangled in another way than expected"
    )
    return [(kernel, small_m) for kernel, small_m in found if small_m is not None]


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_every_tile_of_small_m_is_compiled_as_the_plan_knows_it(
    compiled: Compiled, architecture: str
) -> None:
    listed = re.search(r"small_m_tiles\{\{(.*)\}\};", (CSRC / "tiles.h").read_text())
    assert listed is not None
    tiles = [tuple(map(int, numbers)) for numbers in re.findall(r"\{(\d+), (\d+), (\d+)\}", listed[1])]
    assert len(tiles) == 3
    expected = {
        SmallMKernel(dtype, *tile, access, is_pointwise)
        for tile in tiles
        for dtype in ("float32", "float16", "bfloat16")
        for access, is_pointwise in ((16, True), (16, False), (8, False), (4, False), (2, False))
        if access > 2 or dtype != "float32"
    }
    found = small_ms(compiled, architecture)
    assert {small_m for _, small_m in found} == expected
    assert len(found) == len(expected)
    for kernel, _ in found:
        assert kernel.bounds.threads == 128, kernel.name


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_small_m_streams_with_all_loads_of_a_step_under_way(
    disassembled: Compiled, architecture: str
) -> None:
    for kernel, small_m in small_ms(disassembled, architecture):
        assert kernel.code is not None
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


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_depthwise_toeplitz_multiplies_on_tensor_cores(disassembled: Compiled, architecture: str) -> None:
    """Two channels a warp, each filter row of a pass times the four rows of a strip, and nothing twice."""
    found = set()
    for kernel in disassembled["depthwise_toeplitz", architecture]:
        match = re.search(r"18depthwise_toeplitzI(6__half|13__nv_bfloat16)Li(\d+)E", kernel.name)
        assert match is not None, kernel.name
        dtype, filter_rows = {"6__half": "float16"}.get(match[1], "bfloat16"), int(match[2])
        found.add((dtype, filter_rows))
        assert kernel.bounds.threads == 256
        assert kernel.count(MMA[dtype]) == kernel.count(TENSOR_CORES) == 2 * 4 * filter_rows, kernel.name
        assert kernel.count(r"LDSM\.16\.M88\.4") == 2 * (filter_rows + 3), kernel.name
        # x in four pixels of 8 channels at a time, the filter in the lanes' words of 14 distances
        assert kernel.count(r"STS\.64") == 8 + 14, kernel.name
        assert kernel.code is not None
        loop = main_loop(kernel.code)
        assert loop.share(TENSOR_CORES) >= 0.28, f"{kernel.name}: {loop.families().most_common()}"
    assert found == {(dtype, rows) for dtype in ("float16", "bfloat16") for rows in (5, 7)}


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_every_tile_of_narrow_groups_is_compiled_as_the_plan_knows_it(
    compiled: Compiled, architecture: str
) -> None:
    listed = GROUPED_TILE.findall((CSRC / "tiles.h").read_text())
    assert len(listed) > 3
    expected = {
        (dtype, reader, int(columns), int(blocks)) for dtype in MMA for reader, columns, blocks in listed
    }
    kernels = compiled["grouped", architecture]
    found = [grouped_kernel(kernel.name) for kernel in kernels]
    assert {(g.dtype, g.reader, g.column_blocks, g.blocks) for g in found if g is not None} == expected
    assert len(found) == len(expected)
    assert {kernel.bounds.threads for kernel in kernels} == {256}


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_narrow_groups_take_fragments_straight_from_the_halo(
    disassembled: Compiled, architecture: str
) -> None:
    """A step of a warp: four fragments of x, each used by all blocks of columns; no copies, no barriers."""
    for kernel in disassembled["grouped", architecture]:
        grouped = grouped_kernel(kernel.name)
        assert grouped is not None, "the names are mangled in another way than expected"
        assert kernel.code is not None
        loop = main_loop(kernel.code)
        columns = grouped.column_blocks
        assert count(loop.every_turn, MMA[grouped.dtype]) == 4 * columns, kernel.name
        assert kernel.count(TENSOR_CORES) == 4 * columns, f"{kernel.name} has others outside its main loop"
        by_matrices, by_words = (4 + columns // 2, 1 + columns % 2 * 2)
        if grouped.reader == "words":
            by_matrices, by_words = 0, 4 * 4 + 2 + 2
        assert count(loop.every_turn, r"LDSM\..*M88\.4") == by_matrices, kernel.name
        assert count(loop.every_turn, r"LDS\b.*") == by_words, kernel.name
        assert count(loop.all, r"(LDG|LDGSTS|STG|LD|ST|STS|BAR)\b.*") == 0, kernel.name
        # of the halo and of the weights, in three widths
        assert kernel.count(COPIES[16]) == 2, kernel.name
        assert kernel.count(r"LDGSTS\..*\.64") == 2, kernel.name
        assert kernel.count(r"LDGSTS\..*") == 6, kernel.name


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_depthwise_is_compiled_as_the_plan_knows_it(compiled: Compiled, architecture: str) -> None:
    listed = DEPTHWISE_TILE.findall((CSRC / "tiles.h").read_text())
    assert len(listed) == 8
    expected = set()
    for filter_size, stride, blocks, by_value in listed:
        tile = (int(filter_size), int(stride), int(blocks), bool(by_value))
        expected |= {(dtype, *tile, access) for dtype in MMA for access in ((0,) if by_value else (16, 4))}
    found = set()
    for kernel in compiled["depthwise", architecture]:
        made = depthwise_kernel(kernel.name)
        assert made is not None, "the names are mangled in another way than expected"
        found.add((made.dtype, made.filter, made.stride, made.blocks, made.by_value, made.access_bytes))
        assert kernel.bounds.threads == 128
        assert resident_blocks(kernel, made.shared_bytes, architecture) >= made.blocks, kernel.name
    assert found == expected


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_a_filter_row_loads_every_column_once(disassembled: Compiled, architecture: str) -> None:
    """And multiplies it into every output that needs it: the loop over the rows of 3x3, 5x5 and 7x7."""
    for kernel in disassembled["depthwise", architecture]:
        made = depthwise_kernel(kernel.name)
        assert made is not None
        assert kernel.code is not None
        if made.filter == 0 or made.access_bytes < 16:
            continue
        loop = innermost_loop(kernel.code, r"LDS\.128")
        products = 7 * made.filter * made.values
        columns = 6 * made.stride + made.filter
        assert count(loop, r"LDG\.E.*\.128.*") == count(loop, r"LDG\..*") == columns, kernel.name
        assert count(loop, r"LDS\.128") == count(loop, r"LDS.*") == made.filter * made.values // 4, (
            kernel.name
        )
        assert count(loop, r"(STG|STS|BAR)\b.*") == 0, kernel.name
        assert products <= count(loop, "FFMA.*") <= products + 2, kernel.name
        if made.stride == 1:
            assert products / len(loop) >= {3: 0.45, 5: 0.53, 7: 0.57}[made.filter], kernel.name


def stems(compiled: Compiled, architecture: str) -> list[tuple[CompiledKernel, StemKernel]]:
    """The instantiations of stem."""
    found = [(kernel, stem_kernel(kernel.name)) for kernel in compiled["stem", architecture]]
    assert all(stem is not None for _, stem in found), "the names are mangled in another way than expected"
    return [(kernel, stem) for kernel, stem in found if stem is not None]


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_every_stem_tile_is_compiled_as_the_plan_knows_it(compiled: Compiled, architecture: str) -> None:
    text = (CSRC / "tiles.h").read_text()
    listed = {tuple(map(int, tile)) for tile in STEM_TILE.findall(text[text.index("stem_tiles") :])}
    assert len(listed) > 3
    found = stems(compiled, architecture)
    assert {(s.dtype, s.m, s.n, s.warps, s.blocks) for _, s in found} == {
        (dtype, *tile) for dtype in MMA for tile in listed
    }
    for kernel, stem in found:
        assert kernel.bounds.threads == stem.threads, kernel.name


@pytest.mark.nvcc
@in_one_worker
@every_architecture
def test_the_main_loop_of_the_stem_gathers_and_multiplies(disassembled: Compiled, architecture: str) -> None:
    for kernel, stem in stems(disassembled, architecture):
        assert kernel.code is not None
        loop = innermost_loop(kernel.code, TENSOR_CORES)
        fragments = stem.m // stem.warps // 16
        products = fragments * (stem.n // 8)
        assert count(loop, MMA[stem.dtype]) == kernel.count(TENSOR_CORES) == products, kernel.name
        # both words' taps by one load, two words of each pixel, and weights by ldmatrix
        assert count(loop, r"LDS\.128") == 1, kernel.name
        assert count(loop, r"LDS") == fragments * 4, kernel.name
        assert count(loop, r"LDSM\..*") == kernel.count(r"LDSM\..*") == stem.n // 16, kernel.name
        assert count(loop, r"(LDG|STG|LD|ST|STS|BAR|BRA)\b.*") == 1, (
            f"{kernel.name}: more than the loop's jump"
        )
        assert products / len(loop) > 0.13, f"{kernel.name}: {products} of {len(loop)}"
        if fragments * stem.n == 128:
            assert products / len(loop) > 0.28, f"{kernel.name}: {products} of {len(loop)}"
