"""The simulator's wgmma: documented behaviour, and planted faults to be caught."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.simt import SimulatorError
from tests.simt.binding import run_test_kernel, run_test_kernel_sanitized
from tests.simt_faults import assert_reported

SEEDS = range(4)
THREADS = 128
ROWS = 64
ROW_BYTES = 128

TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}


def per_row(dtype: torch.dtype) -> int:
    return ROW_BYTES // dtype.itemsize


# PTX ISA, "Canonical Layouts", K-major with the 128-byte swizzle: Swizzle<3, 4, 3>
def image(matrix: Tensor) -> list[float]:
    """Rows of 128 bytes as they lie in shared memory: a 16-byte chunk's number, exclusive-or the row's."""
    rows = matrix.contiguous().view(torch.float32).view(-1, 8, 4)
    swizzled = torch.empty_like(rows)
    for row in range(len(rows)):
        for chunk in range(8):
            swizzled[row, chunk ^ row % 8] = rows[row, chunk]
    return swizzled.flatten().tolist()


# PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16", "Accumulator D", and the same for k8
def place_of_accumulators(n: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, [threads, n / 2]."""
    thread = torch.arange(THREADS)[:, None]
    i = torch.arange(n // 2)[None, :]
    return thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2


def operands(dtype: torch.dtype, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((ROWS, per_row(dtype)), (n, per_row(dtype)), (ROWS, n))
    a, b, d = (torch.randint(-9, 10, size, generator=generator).float() for size in sizes)
    return a.to(dtype), b.to(dtype), d


def multiply(kernel: str, a: Tensor, b: Tensor, d: Tensor, seed: int = 0) -> Tensor:
    """What a test kernel makes of a [64, k], b [n, k] and d [64, n]."""
    n = len(b)
    rows, columns = place_of_accumulators(n)
    inputs = image(a) + image(b) + d[rows, columns].flatten().tolist()
    output = run_test_kernel(kernel, inputs, THREADS * n // 2, seed=seed)
    result = torch.empty(ROWS, n)
    result[rows, columns] = torch.tensor(output).view(THREADS, n // 2)
    return result


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("half", 32),
        ("half", 64),
        ("half", 256),
        ("bfloat16", 32),
        ("bfloat16", 256),
        ("tf32", 32),
        ("tf32", 256),
    ],
)
def test_products_have_the_documented_layouts(name: str, n: int, seed: int) -> None:
    a, b, d = operands(TYPES[name], n, seed)
    assert torch.equal(multiply(f"wgmma_{name}_{n}", a, b, d, seed), d + a.float() @ b.float().t())


@pytest.mark.parametrize("name", TYPES)
def test_every_element_of_both_operands_has_its_place(name: str) -> None:
    dtype = TYPES[name]
    for i in range(0, per_row(dtype), 5):
        a, b = torch.zeros(ROWS, per_row(dtype)), torch.zeros(32, per_row(dtype))
        a[:, i] = torch.arange(1.0, ROWS + 1)
        b[:, i] = torch.arange(33.0, 65.0)
        result = multiply(f"wgmma_{name}_32", a.to(dtype), b.to(dtype), torch.zeros(ROWS, 32))
        assert torch.equal(result, a @ b.t())


def test_a_product_can_overwrite_its_accumulators() -> None:
    a, b, d = operands(torch.float16, 32, 0)
    d[3, 4] = torch.nan
    assert torch.equal(multiply("wgmma_overwrite", a, b, d), a.float() @ b.float().t())


def test_each_product_is_rounded_once() -> None:
    a, b = torch.ones(ROWS, 64).half(), torch.ones(32, 64).half()
    # one by one, each of the ones would be lost in the accumulator
    result = multiply("wgmma_half_32", a, b, torch.full((ROWS, 32), 2.0**24))
    assert torch.equal(result, torch.full((ROWS, 32), 2.0**24 + 64))


def test_tf32_operands_are_truncated() -> None:
    a, b = torch.full((ROWS, 32), 1 + 2.0**-11 + 2.0**-12), torch.eye(32)
    assert torch.equal(multiply("wgmma_tf32_32", a, b, torch.zeros(ROWS, 32)), torch.ones(ROWS, 32))


def test_operands_that_were_not_fenced_are_poison() -> None:
    a, b, d = operands(torch.float16, 32, 0)
    for seed in SEEDS:
        assert multiply("missing_async_fence", a, b, d, seed).isnan().all()


def test_products_are_clean_under_the_sanitizers() -> None:
    inputs = (ROWS + 32) * 32 + THREADS * 16
    expected = run_test_kernel("wgmma_tf32_32", [float(i) for i in range(inputs)], THREADS * 16)
    result = run_test_kernel_sanitized("wgmma_tf32_32", inputs, THREADS * 16)
    assert torch.equal(torch.tensor(result), torch.tensor(expected))


def test_sums_are_back_when_their_last_group_was_waited_for() -> None:
    a, b, _ = operands(torch.float16, 32, 0)
    values = image(a) + image(b)
    once = (a.float() @ b.float().t())[place_of_accumulators(32)][:, 0]
    for seed in SEEDS:
        rows = torch.tensor(run_test_kernel("wgmma_groups", values, 10 * THREADS, seed=seed)).view(
            5, 2, THREADS
        )
        assert rows[:2].isnan().all()
        assert rows[2, 0].isnan().all(), "a later group adds to it"
        assert torch.equal(rows[2, 1], once)
        assert torch.equal(rows[3], torch.stack((2 * once, once)))
        assert torch.equal(rows[4], torch.stack((2 * once, 2 * once)))


def pipeline(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """The result of the pipeline's kernel, and the right one: [64, 64]."""
    tiles = [operands(torch.float16, 64, i)[:2] for i in range(5)]
    values = [value for a, b in tiles for value in image(a) + image(b)]
    output = torch.tensor(run_test_kernel(name, values, 2 * THREADS * 16, seed=seed)).view(2, THREADS, 16)
    rows, columns = place_of_accumulators(32)
    result = torch.empty(ROWS, 64)
    for group in range(2):
        result[rows, columns + 32 * group] = output[group]
    return result, torch.stack([a.float() @ b.float().t() for a, b in tiles]).sum(0)


@pytest.mark.parametrize("seed", range(12))
def test_a_pipeline_of_warpgroups(seed: int) -> None:
    result, expected = pipeline("wgmma_pipeline", seed)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["early_release", "missing_stage_fence", "wrong_stage_parity"])
def test_a_fault_of_a_pipeline_shows(name: str) -> None:
    def shows(seed: int) -> bool:
        try:
            result, expected = pipeline(name, seed)
        except SimulatorError as error:
            return re.search(r"deadlock|waited for phase", str(error)) is not None
        return not torch.equal(result, expected)

    assert all(shows(seed) for seed in range(12))


@pytest.mark.parametrize("name", ["read_before_wait", "one_group_too_many"])
def test_sums_are_poison_before_the_wait(name: str) -> None:
    for seed in SEEDS:
        early, late = torch.tensor(run_test_kernel(name, [], 2 * THREADS, seed=seed)).view(2, THREADS)
        assert early.isnan().all()
        assert late.eq(0).all()


REPORTED_FAULTS = {
    "missing_first_fence": (
        r"multiply_async \(warpgroups\.cu:\d+\) without fence_products .*: it is the first of warpgroup 0"
    ),
    "written_before_wait": (
        r"thread 5 wrote its accumulators while multiply_async \(warpgroups\.cu:\d+\) on them was under way"
    ),
    "written_without_fence": r"without fence_products .*: the threads have written its accumulators since",
    "restarted_without_fence": r"without fence_products .*: the threads have had its accumulators since",
    "never_waited_product": r"thread \d+ exited before warpgroup 0 waited for its products of multiply_async",
    "never_committed": r"thread \d+ exited before warpgroup 0 waited for its products of multiply_async",
    "swizzle_64": r"with the descriptor of a, \d+: swizzling mode 2, of which only 1",
    "dense_stride": r"the descriptor of b, \d+: a stride of 512 bytes from eight rows to the next",
    "second_row": r"the descriptor of a, \d+: it starts 128 bytes behind a multiple of 1024",
    "past_the_row": r"the descriptor of a, \d+: it starts 112 bytes behind a multiple of 1024",
    "base_offset": r"the descriptor of a, \d+: a base offset",
    "matrix_outside": r"the descriptor of b, \d+: bytes 9216 to 13312 .* the block has 12288",
    "unused_bits": r"the descriptor of a, \d+: bits are set that have no meaning",
    "two_descriptors": r"multiply_async \(.*\): threads 0 and 64 of warpgroup 0 differ in their descriptors",
    "warp_missing": r"needs all 128 lanes of warpgroup 0, but threads? .* exited",
    "warp_elsewhere": r"divergent collective in warpgroup 0: thread \d+ is at \w+ \(.*\) while threads? ",
    "two_shapes": r"on accumulators of which some are pending for a product of another shape",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run_test_kernel(name, [], THREADS, seed=seed), REPORTED_FAULTS[name], SEEDS)
