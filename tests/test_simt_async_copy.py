"""The simulator's cp.async: documented behaviour, and planted faults that it must catch."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.simt import NAN_SEEDS, SimulatorError
from tests.simt.binding import run_test_kernel, run_test_kernel_sanitized
from tests.simt_faults import assert_reported

SEEDS = range(8)
THREADS = 64
COUNT = [float(i) for i in range(THREADS)]


@pytest.mark.parametrize("floats", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_lands_at_its_wait_and_is_everybodys_after_a_barrier(floats: int, seed: int) -> None:
    values = torch.arange(THREADS * floats, dtype=torch.float32)
    before, own, neighbours = torch.tensor(
        run_test_kernel(f"copy_{4 * floats}", values.tolist(), 3 * THREADS, seed=seed)
    ).view(3, THREADS)
    sums = values.view(THREADS, floats).sum(1)
    assert before.isnan().all()
    assert torch.equal(own, sums)
    assert torch.equal(neighbours, sums.roll(-1))


def test_a_wait_lands_all_committed_groups_but_the_latest() -> None:
    landed = torch.tensor(run_test_kernel("copy_groups", COUNT, 5 * 4 * THREADS)).view(5, 4, THREADS)
    assert (landed == landed[:, :, :1]).all()
    assert landed[:, :, 0].tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],  # an uncommitted copy is in no group
        [1, 1, 1, 1],  # and an empty group counts as one
    ]


def test_a_copy_reads_its_source_as_late_as_it_may() -> None:
    assert run_test_kernel("late_source", COUNT, THREADS) == [2.0] * THREADS


def test_an_invalid_copy_writes_zeros_and_reads_nothing() -> None:
    expected = [value if i % 2 == 0 else 0.0 for i, value in enumerate(COUNT)]
    assert run_test_kernel("zero_fill", COUNT, THREADS) == expected
    assert run_test_kernel_sanitized("zero_fill", THREADS - 1, THREADS) == expected


def test_a_copy_that_nobody_waits_for_is_dropped() -> None:
    assert run_test_kernel("never_waited", COUNT, THREADS) == [1.0] * THREADS


@pytest.mark.parametrize("name", ["missing_wait", "too_many_pending", "missing_commit"])
def test_a_copy_that_may_be_under_way_reads_as_poison(name: str) -> None:
    for seed in SEEDS:
        assert all(math.isnan(value) for value in run_test_kernel(name, COUNT, THREADS, seed=seed))


def test_a_wait_is_for_the_threads_own_copies_only() -> None:
    for seed in SEEDS:
        output = run_test_kernel("wait_of_another_thread", COUNT, THREADS, seed=seed)
        assert output[:32] == COUNT[:32]
        assert all(math.isnan(value) for value in output[32:])


@pytest.mark.parametrize("name", ["missing_barrier_after_wait", "stage_reused_early"])
def test_a_missing_barrier_around_copies_shows(name: str) -> None:
    for seed in NAN_SEEDS:
        assert any(math.isnan(value) for value in run_test_kernel(name, COUNT, THREADS, seed=seed))


def test_a_wrong_zero_fill_shows() -> None:
    output = run_test_kernel("one_valid_too_many", COUNT, THREADS)
    assert output[-1] == COUNT[-1]
    with pytest.raises(SimulatorError) as caught:
        run_test_kernel_sanitized("one_valid_too_many", THREADS - 1, THREADS)
    report = str(caught.value)
    assert re.search(r"heap-buffer-overflow[\s\S]*READ[\s\S]*copy_async[\s\S]*one_valid_too_many", report), (
        report
    )


REPORTED_FAULTS = {
    "misaligned_destination": (
        r"misaligned_destination, block 0 of 1, .*copy_async \(async_copy\.cu:\d+\) at byte 4 of shared "
        r"memory, which is not a multiple of 8"
    ),
    "misaligned_source": r"copy_async \(.*\) from a global address that is not a multiple of 16",
    "destination_outside": r"copy_async \(.*\) of 4 bytes at byte 4096 .* the block has 4096",
    "not_shared": r"shared_address \(.*\) of a pointer that does not point to shared memory",
    "written_under_way": (
        r"byte \d+ of shared memory was written while thread \d+'s copy_async \(async_copy\.cu:\d+\) to "
        r"it was under way"
    ),
    "written_before_the_end": r"byte 0 of shared memory was written while thread 0's copy_async \(.*\) to it",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(
        lambda seed: run_test_kernel(name, COUNT, THREADS, seed=seed), REPORTED_FAULTS[name], SEEDS
    )


def test_copies_of_a_reported_run_are_forgotten() -> None:
    with pytest.raises(SimulatorError):
        run_test_kernel("written_before_the_end", COUNT, THREADS)
    assert run_test_kernel("never_waited", COUNT, THREADS) == [1.0] * THREADS
