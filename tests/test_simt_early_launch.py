"""The simulator's launches that start early: documented behaviour, and planted faults that it must catch."""

from __future__ import annotations

import math
import re

import pytest

from tests.simt import SimulatorError
from tests.simt.binding import run_test_kernel, run_test_kernel_sanitized
from tests.simt_faults import assert_reported

SEEDS = range(8)
THREADS, BLOCKS = 64, 2
INPUT = [float(i) for i in range(THREADS * BLOCKS)]
TWICE = [2 * value for value in INPUT]
ONE = 37


def run(name: str, seed: int = 0) -> list[float]:
    return run_test_kernel(name, INPUT, len(INPUT), seed=seed)


def run_sanitized(name: str) -> list[float]:
    return run_test_kernel_sanitized(name, len(INPUT), len(INPUT))


RIGHT = (
    *("early_waits", "early_waits_of_a_cluster"),
    *("early_one_waits_for_all", "early_one_waits_for_the_cluster"),
    "early_after_a_report",
    *("normal_waits", "normal_read", "normal_copy", "normal_write"),
)


@pytest.mark.parametrize("name", RIGHT)
def test_behind_the_wait_and_without_an_early_start_everything_is_there(name: str) -> None:
    assert all(run(name, seed) == TWICE for seed in SEEDS)


@pytest.mark.parametrize("name", RIGHT[:4])
def test_sanitizers_accept_what_comes_before_the_wait_and_behind_it(name: str) -> None:
    assert run_sanitized(name) == TWICE


def test_a_launch_finds_what_the_one_ahead_has_left() -> None:
    assert all(run("early_one_after_the_other", seed) == [v + 1 for v in TWICE] for seed in SEEDS)


@pytest.mark.parametrize(("name", "threads"), [("early_read", range(THREADS)), ("early_read_of_one", (ONE,))])
def test_what_is_read_before_the_wait_is_nan(name: str, threads: range | tuple[int, ...]) -> None:
    for seed in SEEDS:
        nan = [i for i, value in enumerate(run(name, seed)) if math.isnan(value)]
        assert nan == [block * THREADS + thread for block in range(BLOCKS) for thread in threads]


@pytest.mark.parametrize(
    ("name", "access"), [("early_read", "READ"), ("early_read_of_one", "READ"), ("early_write", "WRITE")]
)
def test_sanitizers_see_an_access_before_the_wait(name: str, access: str) -> None:
    with pytest.raises(SimulatorError) as caught:
        run_sanitized(name)
    report = str(caught.value)
    assert re.search(rf"use-after-poison[\s\S]*{access} of size 4[\s\S]*early_launch\.cu", report), report


BEFORE = r"before await_prerequisites: the kernel ahead may not have ended"
NEVER_WAITED = "the block has ended, and none of its threads has called await_prerequisites"

REPORTED_FAULTS = {
    "early_write": (
        rf"write, block [01] of 2, .*byte (148|404) of the output was written {BEFORE}\n"
        r"  the kernel ahead: 64 threads wait for its end\n"
        r"  warp 0: threads 0-31 at await_prerequisites \(early_launch\.cu:\d+\)\n"
    ),
    "early_one_does_not_wait": rf"the output was written {BEFORE}[\s\S]*; thread {ONE} exited",
    "early_copy": rf"copy_async \(early_launch\.cu:\d+\) {BEFORE}",
    "early_load_tile": rf"load_tile \(early_launch\.cu:\d+\) {BEFORE}",
    "early_load_im2col": rf"load_im2col \(early_launch\.cu:\d+\) {BEFORE}",
    "early_store_tile": rf"store_tile \(early_launch\.cu:\d+\) {BEFORE}",
    "early_never_waits": rf"block [01] of 2, .*{NEVER_WAITED}",
    "early_block_never_waits": rf"block 1 of 2, .*{NEVER_WAITED}",
    "early_deadlock": r"deadlock[\s\S]*: 1 of 64 threads arrived[\s\S]*threads 32-36, 38-63 exited",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run(name, seed), REPORTED_FAULTS[name], SEEDS)
