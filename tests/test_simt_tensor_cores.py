"""The simulator's ldmatrix, mma.sync and tf32: documented behaviour, and planted faults to be caught."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.simt.binding import run_test_kernel
from tests.simt_faults import assert_reported

SEEDS = range(4)
LANES = range(32)

Element = Callable[[int, int], tuple[int, int]]
"""(lane, i) -> row and column of that lane's i-th element."""


def matrix_of_words() -> list[float]:
    """Row addresses that are no simple pattern: a permutation of 64 rows of 16 bytes, the first 32 taken."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    return (order[:32] * 16).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_load_matrices_gives_a_lane_one_word_of_each_matrix(seed: int) -> None:
    addresses = matrix_of_words()
    output = torch.tensor(run_test_kernel("load_matrices", [float(a) for a in addresses], 128, seed=seed))
    expected = [[addresses[8 * i + lane // 4] // 4 + lane % 4 for i in range(4)] for lane in LANES]
    assert output.view(32, 4).int().tolist() == expected


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", ".f16 and .bf16"
def element_of_a_16(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 + (0 if 0 <= i < 2 or 4 <= i < 6 else 8)
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def element_of_b_16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


# PTX ISA, "Matrix Fragments for mma.m16n8k8", ".tf32"
def element_of_a_8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i in (0, 2) else 8), lane % 4 + (0 if i < 2 else 4)


def element_of_b_8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane // 4


def element_of_d(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


TYPES = {"half": (torch.float16, 16), "bfloat16": (torch.bfloat16, 16), "tf32": (torch.float32, 8)}


def fragment_words(matrix: Tensor, element: Element, lane: int) -> list[float]:
    """A lane's elements in the order of the manual, packed into 32-bit words that are written as floats."""
    elements = matrix.numel() // 32
    chosen = torch.stack([matrix[element(lane, i)] for i in range(elements)])
    data = bytes(chosen.view(torch.uint8).tolist())
    return list(struct.unpack(f"{len(data) // 4}f", data))


def multiply_add(name: str, a: Tensor, b: Tensor, d: Tensor, seed: int = 0) -> Tensor:
    """d + a @ b, by the test kernel: [16, k] x [k, 8] in storage, [16, 8] in float32."""
    dtype, k = TYPES[name]
    of_a, of_b = (element_of_a_16, element_of_b_16) if k == 16 else (element_of_a_8, element_of_b_8)
    words = [
        word
        for lane in LANES
        for matrix, element in ((a.to(dtype), of_a), (b.to(dtype), of_b), (d, element_of_d))
        for word in fragment_words(matrix, element, lane)
    ]
    output = run_test_kernel(f"multiply_add_{name}", words, 128, seed=seed)
    result = torch.empty(16, 8)
    for lane in LANES:
        for i in range(4):
            result[element_of_d(lane, i)] = output[lane * 4 + i]
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TYPES)
def test_multiply_add_has_the_documented_layouts(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, k = TYPES[name]
    a, b, d = (
        torch.randint(-9, 10, size, generator=generator).float() for size in ((16, k), (k, 8), (16, 8))
    )
    expected = (d.double() + a.double() @ b.double()).float()
    assert torch.equal(multiply_add(name, a, b, d, seed), expected)


@pytest.mark.parametrize("name", TYPES)
def test_every_element_of_both_operands_has_its_place(name: str) -> None:
    _, k = TYPES[name]
    for i in range(k):
        a, b = torch.zeros(16, k), torch.zeros(k, 8)
        a[:, i] = torch.arange(1.0, 17.0)
        b[i, :] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
        assert torch.equal(multiply_add(name, a, b, torch.zeros(16, 8)), a @ b)


@pytest.mark.parametrize("name", TYPES)
def test_the_sum_is_rounded_once(name: str) -> None:
    _, k = TYPES[name]
    a, b = torch.ones(16, k), torch.ones(k, 8)
    # one by one, each of the k ones would be lost in the accumulator
    result = multiply_add(name, a, b, torch.full((16, 8), 2.0**24))
    assert torch.equal(result, torch.full((16, 8), 2.0**24 + k))


def test_half_operands_keep_their_subnormals_and_infinities() -> None:
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[0, 0], b[0, 0] = 2.0**-24, 1024.0
    a[1, 1], b[1, 1] = math.inf, 1.0
    result = multiply_add("half", a, b, torch.zeros(16, 8))
    assert result[0, 0] == 2.0**-14
    assert result[1, 1] == math.inf
    assert result[1, 0].isnan(), "infinity times zero"


def test_tf32_operands_are_truncated() -> None:
    a, b = torch.full((16, 8), 1 + 2.0**-11 + 2.0**-12), torch.eye(8)
    assert torch.equal(multiply_add("tf32", a, b, torch.zeros(16, 8)), torch.ones(16, 8))
    a = torch.full((16, 8), 1 + 2.0**-10)
    assert torch.equal(multiply_add("tf32", a, b, torch.zeros(16, 8)), a)


def nearest_tf32(value: float) -> float:
    """11 significant bits, or a multiple of 2**-136 below the normal numbers; ties away from zero."""
    if value == 0 or not math.isfinite(value):
        return value
    step = max(2.0 ** (math.frexp(value)[1] - 11), 2.0**-136)
    rounded = math.copysign(math.floor(abs(value) / step + 0.5) * step, value)
    return rounded if abs(rounded) < 2.0**128 else math.copysign(math.inf, value)


def test_round_to_tf32_takes_the_nearest_and_ties_away_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(0, 256, (2000,), generator=generator, dtype=torch.int32) << 23
    fractions = torch.randint(0, 1 << 10, (2000,), generator=generator, dtype=torch.int32) << 13
    steps = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], dtype=torch.int32)
    bits = (exponents + fractions)[:, None] + steps
    values = torch.cat((bits.flatten(), bits.flatten() | -(1 << 31))).view(torch.float32)
    values = torch.cat((values, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])))
    output = torch.tensor(run_test_kernel("round_to_tf32", values.tolist(), len(values)))
    expected = torch.tensor([nearest_tf32(value) for value in values.tolist()])
    assert torch.equal(output.isnan(), values.isnan())
    assert torch.equal(output.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert torch.equal(output.signbit()[~values.isnan()], values.signbit()[~values.isnan()])


def test_the_lower_bits_of_a_tf32_are_not_the_result() -> None:
    """Who takes the difference of a value and its tf32 must clear them first."""
    value = 1 + 2.0**-12
    assert run_test_kernel("round_to_tf32", [value], 1) == [1.0]
    assert run_test_kernel("round_to_tf32_unmasked", [value], 1) != [1.0]


def product_operands(scale: float) -> tuple[Tensor, Tensor, list[float]]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-9, 10, size, generator=generator).float() * scale for size in ((16, 8), (8, 8)))
    return a, b, torch.cat((a.flatten(), b.t().flatten())).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_swizzled_product_is_right_and_a_mismatched_swizzle_shows(seed: int) -> None:
    a, b, values = product_operands(1.0)
    assert torch.equal(torch.tensor(run_test_kernel("product", values, 128, seed=seed)).view(16, 8), a @ b)
    mismatched = torch.tensor(run_test_kernel("mismatched_swizzle", values, 128, seed=seed)).view(16, 8)
    assert not torch.equal(mismatched, a @ b)


def test_missing_rounding_shows_as_truncation() -> None:
    a, b, values = product_operands(1 + 2.0**-11)
    expected = (a.double() @ b.double()).abs().sum()
    rounded = torch.tensor(run_test_kernel("product", values, 128))
    truncated = torch.tensor(run_test_kernel("unrounded_product", values, 128))
    assert rounded.abs().sum() > expected > truncated.abs().sum()


REPORTED_FAULTS = {
    "misaligned_row": (
        r"misaligned_row, block 0 of 1, .*load_matrices \(tensor_cores\.cu:\d+\) at byte 152 of shared "
        r"memory, which is not a multiple of 16"
    ),
    "row_outside": r"load_matrices \(.*\) of 16 bytes at byte 1024 .* the block has 1024",
    "row_before": r"load_matrices \(.*\) of 16 bytes at byte -16 of shared memory",
    "missing_lane": r"multiply_add \(.*\) needs all 32 lanes of warp 0, but thread 3 exited",
    "two_types": r"divergent collective in warp 0: .*; their operands or types differ",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run_test_kernel(name, [0.0], 1, seed=seed), REPORTED_FAULTS[name], SEEDS)
