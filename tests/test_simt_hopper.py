"""The simulator's mbarrier, stmatrix and setmaxnreg: documented behaviour, and planted faults."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from tests.simt import NAN_SEEDS, SimulatorError
from tests.simt.binding import run_test_kernel, run_test_kernel_sanitized
from tests.simt_faults import assert_reported

SEEDS = range(8)
THREADS = 64
COUNT = [float(i) for i in range(THREADS)]


def run(name: str, outputs: int = THREADS, seed: int = 0) -> Tensor:
    return torch.tensor(run_test_kernel(name, COUNT * 4, outputs, seed=seed))


def outcome(name: str, outputs: int = THREADS, seed: int = 0) -> Tensor | str:
    """The output, or the report where there is one."""
    try:
        return run(name, outputs, seed)
    except SimulatorError as error:
        return str(error)


@pytest.mark.parametrize("seed", SEEDS)
def test_phases_take_turns(seed: int) -> None:
    expected = torch.stack([torch.arange(THREADS).roll(-17) + i for i in range(5)])
    assert torch.equal(run("phases", 5 * THREADS, seed).view(5, THREADS), expected.float())


def test_the_wrong_parity_reads_too_early() -> None:
    """The parity before the first is complete from the beginning; one phase on, the wait is for the next."""
    for seed in SEEDS:
        found = outcome("wrong_parity", 5 * THREADS, seed)
        if isinstance(found, str):
            assert re.search(r"deadlock|beyond the|waited for phase", found), found
        else:
            assert found[:THREADS].isnan().any()


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_count_before_and_after_they_are_expected(seed: int) -> None:
    assert torch.equal(run("bulk", seed=seed), torch.arange(THREADS).float() % 16)


def test_phases_and_copies_are_clean_under_the_sanitizers() -> None:
    assert run_test_kernel_sanitized("phases", THREADS, 5 * THREADS) == run("phases", 5 * THREADS).tolist()
    assert run_test_kernel_sanitized("bulk", 16, THREADS) == run("bulk").tolist()


def test_a_wait_for_the_wrong_parity_of_a_copy_reads_poison() -> None:
    found = [outcome("wrong_parity_of_bulk", seed=seed) for seed in SEEDS]
    early = [output for output in found if not isinstance(output, str)]
    assert early
    assert all(output.isnan().any() for output in early)
    # who was late enough to see the first phase complete waits for the second
    assert all("for parity 1 (phase 1)" in report for report in found if isinstance(report, str))


def test_too_few_expected_bytes_are_a_deadlock_or_read_poison() -> None:
    """Or pass, where the bytes that nobody expects land just behind the others."""
    found = [outcome("too_few_bytes", seed=seed) for seed in SEEDS]
    reports = [each for each in found if isinstance(each, str)]
    assert reports
    assert all("pending are 0 of 1 arrivals and -16 bytes" in report for report in reports)
    assert any(not isinstance(each, str) and each.isnan().any() for each in found)


# PTX ISA, "Warp-level matrix store instruction: stmatrix"
def test_store_matrices_is_the_other_way_round_from_load_matrices() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:32].tolist()
    addresses = [float(16 * row) for row in order]
    for seed in NAN_SEEDS:
        output = run_test_kernel("store_matrices", addresses, 256 + 128, seed=seed)
        expected = [math.nan] * 256
        for matrix in range(4):
            for row in range(8):
                for word in range(4):
                    first = order[8 * matrix + row] * 4
                    expected[first + word] = 4.0 * (row * 4 + word) + matrix
        assert torch.equal(torch.tensor(output[:256]).nan_to_num(-1), torch.tensor(expected).nan_to_num(-1))
        assert output[256:] == [float(i) for i in range(128)]


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_by_its_address(seed: int) -> None:
    values = torch.arange(THREADS * 4).view(THREADS, 4).float()
    output = torch.tensor(run_test_kernel("by_address", values.flatten().tolist(), THREADS * 4, seed=seed))
    assert torch.equal(output.view(THREADS, 4), torch.cat((values.roll(-1, 0)[:, 2:], values[:, 2:]), 1))


def test_a_copy_reaches_the_async_proxy_by_a_fence_behind_its_wait() -> None:
    values = [float(i) for i in range(THREADS * 4)]
    assert run_test_kernel("copied_and_fenced", values, THREADS * 4) == values
    assert torch.tensor(run_test_kernel("fenced_too_early", values, THREADS * 4)).isnan().all()


def test_registers_move_between_warpgroups() -> None:
    for seed in SEEDS:
        assert run("registers", 384, seed).eq(1).all()


REPORTED_FAULTS = {
    "too_many_bytes": (
        r"deadlock: no thread can go on\n  barrier at byte 1024 of shared memory: threads wait for parity 0 "
        r"\(phase 0\), pending are 0 of 1 arrivals and 16 bytes\n  warp 0: threads 0-31 at wait \(hopper"
    ),
    "too_few_arrivals": r"deadlock: .*\n.* parity 0 \(phase 0\), pending are 2 of 66 arrivals and 0 bytes",
    "too_many_arrivals": r"arrive \(.*\) of the barrier .* beyond the 1 arrivals of phase 0, which waits for",
    "missed_phase": r"thread \d+ waited for phase 0, but before it went on, phase 1 was complete|deadlock",
    "missing_publish": (
        r"bulk_copy \(.*\) of the barrier at byte 1024 .* which thread 0 made and did not publish: "
        r"fence\.mbarrier_init and fence\.proxy\.async are missing"
    ),
    "no_arrivals": r"init_barrier \(hopper\.cu:\d+\) of the barrier at byte 1024 .* with 0 arrivals",
    "made_twice": r"init_barrier \(.*\) of the barrier at byte 1024 .*, which is there already",
    "never_made": r"arrive \(.*\) of the barrier at byte 1024 .*, which was not initialised",
    "overwritten_barrier": r"arrive \(.*\) of the barrier at byte 1024 .*, which was overwritten",
    "million_bytes": r"arrive_expecting \(.*\) .*: 1048576 pending bytes, beyond 1048575",
    "misaligned_store": r"store_matrices \(.*\) at byte 4 of shared memory, which is not a multiple of 16",
    "store_outside": r"store_matrices \(.*\) of 16 bytes at byte -16 of shared memory",
    "misaligned_load": r"load_shared \(.*\) at byte 8 of shared memory, which is not a multiple of 16",
    "shared_load_outside": r"load_shared \(.*\) of 16 bytes at byte 1040 .* the block has 1040",
    "too_many_registers": r"_registers \(.*\) to \d+ registers: with what the others have that is 66560",
    "odd_registers": r"take_registers \(.*\) to 236: it must be a multiple of 8 from 24 to 256",
    "three_warps_give": r"give_registers \(.*\) needs all 128 lanes of warpgroup 0, but threads? .* exited",
    "two_counts": r"give_registers \(.*\) to \d+ registers by one thread of warpgroup 0, to \d+ by another",
    "give_to_more": r"give_registers \(.*\) to 32 registers, but warpgroup 0 has 24",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run(name, 384, seed), REPORTED_FAULTS[name], SEEDS)


def test_barriers_of_a_reported_run_are_forgotten() -> None:
    with pytest.raises(SimulatorError):
        run("too_many_bytes")
    assert torch.equal(run("bulk"), torch.arange(THREADS).float() % 16)
