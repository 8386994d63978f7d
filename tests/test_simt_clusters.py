"""The simulator's clusters: documented behaviour, and planted faults to be caught."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.simt import NAN_SEEDS, SimulatorError
from tests.simt.binding import run_test_kernel
from tests.simt_faults import assert_reported

SEEDS = range(8)
THREADS = 64


def run(name: str, blocks: int, cluster: int, per_thread: int = 1, seed: int = 0) -> Tensor:
    outputs = blocks * THREADS * per_thread
    output = run_test_kernel(name, [float(blocks), float(cluster)], outputs, seed=seed)
    return torch.tensor(output).view(blocks, THREADS, per_thread)


@pytest.mark.parametrize("cluster", [1, 2, 3, 4, 8])
def test_blocks_read_what_their_cluster_wrote(cluster: int) -> None:
    blocks = 2 * cluster
    written = torch.arange(blocks * THREADS).view(2, cluster, THREADS)
    expected = written.roll((-1, -1), (1, 2)).view(blocks, THREADS)
    for seed in SEEDS:
        output = run("exchange", blocks, cluster, 2, seed)
        assert torch.equal(output[:, :, 0], expected.float())
        assert torch.equal(
            output[:, :, 1], (torch.arange(blocks) % cluster).float()[:, None].expand(-1, THREADS)
        )


def test_reading_before_the_others_have_written_shows() -> None:
    assert all(run("read_too_early", 8, 4, 2, seed)[:, :, 0].isnan().any() for seed in NAN_SEEDS)


def test_the_memory_of_a_block_that_has_ended_is_gone() -> None:
    def report(seed: int) -> str:
        try:
            run("ended_too_early", 4, 2, 2, seed)
        except SimulatorError as error:
            return str(error)
        return ""

    reports = [text for text in map(report, SEEDS) if text]
    assert reports
    for text in reports:
        assert re.search(
            r"load_cluster \(clusters\.cu:\d+\) of block [01] .* its shared memory is gone", text
        ), text


def test_a_cluster_does_not_wait_for_threads_that_have_exited() -> None:
    for seed in SEEDS:
        output = run("some_exit_of_a_cluster", 6, 3, seed=seed)[:, :, 0]
        assert (output == 1).nonzero().tolist() == [
            [b, t] for b in (1, 2, 4, 5) for t in range(1, THREADS, 2)
        ]


REPORTED_FAULTS = {
    "rank_outside": r"block [0-3] of 4, .*load_cluster \(.*\) of block 4 of a cluster of 4",
    "divergent_cluster": (
        r"deadlock: no thread can go on\n  block 0 of the cluster:\n  the cluster's barrier at sync_cluster "
        r"\(clusters\.cu:\d+\): 255 of 256 threads arrived\n  warp 0: threads 0-31 at sync_cluster[\s\S]*"
        r"block 1 of the cluster:[\s\S]*warp 0: thread 0 at named_barrier .*; threads 1-31 at sync_cluster"
    ),
    "cluster_waits_for_all": r"deadlock: [\s\S]*: 252 of 256 threads arrived",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    assert_reported(lambda seed: run(name, 4, 4, seed=seed), REPORTED_FAULTS[name], SEEDS)
    run("exchange", 4, 4, 2)


@pytest.mark.parametrize(("blocks", "cluster"), [(4, 0), (9, 9), (16, 16), (6, 4), (2, -1)])
def test_a_cluster_that_no_device_takes_is_refused(blocks: int, cluster: int) -> None:
    with pytest.raises(
        RuntimeError, match="cluster must have from 1 to 8 blocks, and divide the number of blocks"
    ):
        run("exchange", blocks, cluster, 2)
