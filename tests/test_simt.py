"""The simulator itself: each feature against documented behaviour, and planted faults that it must catch."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

import pytest
import torch

from tests.simt import NAN_SEEDS, SimulatorError, build
from tests.simt.binding import run_test_kernel, run_test_kernel_sanitized

# What one test builds the others use.
SEEDS = range(8)
COUNT = [float(i) for i in range(64)]

both_switches = pytest.mark.parametrize("target", ["kernels", "kernels_ucontext"])


@both_switches
def test_coordinates(target: str) -> None:
    output = run_test_kernel("coordinates", [], 3 * 64 * 5, target=target)
    rows = torch.tensor(output).view(3, 64, 5)
    for block in range(3):
        for thread in range(64):
            assert rows[block, thread].tolist() == [thread, thread % 32, thread // 32, block, 3]


@both_switches
@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_barrier_and_shuffles_make_a_sum(target: str, seed: int) -> None:
    values = [float(i * i % 97) for i in range(3 * 128)]
    sums = run_test_kernel("block_sum", values, 3, seed=seed, target=target)
    assert sums == [sum(values[i : i + 128]) for i in (0, 128, 256)]


def test_shuffles_take_the_documented_lane() -> None:
    lanes = list(range(32))
    expected = {
        "xor 1": [i ^ 1 for i in lanes],
        "xor 31": [i ^ 31 for i in lanes],
        "down 4: the last four keep their own": [i + 4 if i + 4 < 32 else i for i in lanes],
        "down 0": lanes,
        "from lane 7": [7] * 32,
        "from lane 33, of which five bits count": [1] * 32,
        "from a lane that each chooses": [31 - i for i in lanes],
        "eight bytes": [(i ^ 2) + 100 for i in lanes],
        "two bytes, a distance that each chooses": [i + i % 2 if i + i % 2 < 32 else i for i in lanes],
    }
    rows = torch.tensor(run_test_kernel("shuffles", [], 32 * len(expected))).view(-1, 32)
    assert dict(zip(expected, rows.int().tolist(), strict=True)) == expected


def test_ballot_collects_one_bit_per_lane_of_a_warp() -> None:
    output = run_test_kernel("votes", [], 128)
    assert output[:32] == [float(i % 3 == 0) for i in range(32)]
    assert output[32:64] == [float(i % 4 == 0) for i in range(32)]
    assert output[64:] == [0.0] * 32 + [float(0xFFFF)] * 32


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_let_each_half_run_at_its_own_pace(seed: int) -> None:
    output = run_test_kernel("rotate_halves", [float(i) for i in range(128)], 128, seed=seed)
    assert output[:64] == [float((i + 3) % 64) for i in range(64)]
    assert output[64:] == [float(64 + (i + 5) % 64) for i in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
def test_sync_threads_does_not_wait_for_exited_threads(seed: int) -> None:
    output = run_test_kernel("early_exit", [], 128, seed=seed)
    assert output == [-1.0 if i >= 96 or i == 40 else 95.0 for i in range(128)]


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_holds_garbage_before_every_block(seed: int) -> None:
    """NaN, or large numbers, for kernels that compute again what is not finite."""
    found = run_test_kernel("fresh_shared_memory", [], 4 * 64, seed=seed)
    assert all(math.isnan(value) if seed in NAN_SEEDS else 1e36 < value < 2e36 for value in found)


def test_blocks_run_in_an_order_of_the_seed_and_each_once() -> None:
    orders = [run_test_kernel("block_order", [], 12, seed=seed) for seed in SEEDS]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) > 4
    assert run_test_kernel("block_order", [], 12, seed=3) == orders[3]


def test_effects_land_late_but_before_a_wait_for_them_ends() -> None:
    values = [float(i + 1) for i in range(64)]
    landed = 0
    for seed in NAN_SEEDS:
        output = run_test_kernel("late_copies", values, 192, seed=seed)
        at_once, later, of_thread_0 = output[:64], output[64:128], output[128:]
        assert all(math.isnan(value) for value in at_once)
        assert of_thread_0 == [1.0] * 64
        assert all(math.isnan(value) or value == values[i] for i, value in enumerate(later))
        landed += sum(not math.isnan(value) for value in later)
    assert 0 < landed < len(NAN_SEEDS) * 64


def test_conversions_round_to_nearest_even() -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    exact = torch.cat((halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()))
    bits = exact.view(torch.int32)
    # the values themselves, the ties above them and the neighbours of both
    steps = (0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    chosen = torch.cat([bits[:: 7 if step else 1] + step for step in steps]).view(torch.float32)
    output = torch.tensor(run_test_kernel("conversions", chosen.tolist(), 2 * chosen.numel()))
    rounded = torch.cat((chosen.half().float(), chosen.bfloat16().float()))
    assert torch.equal(output.isnan(), rounded.isnan())
    assert torch.equal(output.nan_to_num(0.0), rounded.nan_to_num(0.0))
    assert torch.equal(output.signbit()[~output.isnan()], rounded.signbit()[~rounded.isnan()])


def test_a_clamp_keeps_a_nan_and_knows_the_sign_of_zero() -> None:
    """max.NaN and min.NaN, unlike fmaxf and fminf, and -0 below +0."""
    nan, inf = torch.nan, torch.inf
    values = (nan, -inf, -1.0, -0.0, 0.0, 3.0, 6.0, 7.0, inf)
    for low, high, expected in (
        (0.0, 6.0, (nan, 0.0, 0.0, 0.0, 0.0, 3.0, 6.0, 6.0, 6.0)),
        (-inf, inf, values),
        (-2.0, -0.0, (nan, -2.0, -1.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0)),
    ):
        triples = [each for value in values for each in (value, low, high)]
        output = torch.tensor(run_test_kernel("clamps", triples, len(values)))
        assert torch.equal(output.isnan(), torch.tensor(expected).isnan())
        assert torch.equal(output[1:], torch.tensor(expected[1:]))
        assert torch.equal(output[1:].signbit(), torch.tensor(expected[1:]).signbit())


def test_only_an_explicit_fused_multiply_add_rounds_once() -> None:
    a, c = 1 + 2.0**-12, -(1 + 2.0**-11)
    assert run_test_kernel("multiply_add", [a, a, c], 2) == [2.0**-24, 0.0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 32, 0), "number of blocks must be from 1"),
        ((1, 0, 0), "number of threads must be from 1 to 1024"),
        ((1, 1056, 0), "number of threads must be from 1 to 1024"),
        ((1, 32, 227 * 1024 + 16), "dynamic shared memory beyond the kernel's limit"),
    ],
)
def test_a_launch_that_no_device_takes_is_refused(shape: tuple[float, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        run_test_kernel("any_shape", shape, 1)
    assert not isinstance(caught.value, SimulatorError)


def test_the_largest_launch_is_taken() -> None:
    blocks, threads, shared_bytes = 3.0, 1024.0, 227.0 * 1024
    counts = run_test_kernel("any_shape", (blocks, threads, shared_bytes), 1024, fill=0.0)
    assert counts == [blocks] * 1024


def test_a_smaller_launch_on_another_thread_takes_no_shared_memory_away() -> None:
    assert run_test_kernel("two_sizes", [], 1, fill=0.0) == [3.0]
    with pytest.raises(RuntimeError, match="dynamic shared memory beyond the kernel's limit"):
        run_test_kernel("two_sizes_with_exact_limits", [], 1)


REPORTED_FAULTS = {
    "exit_before_counted_barrier": (
        r"exit_before_counted_barrier, block 0 of 1, seed 3: deadlock: no thread can go on\n"
        r"  barrier 3 at named_barrier \(faults\.cu:\d+\): 63 of 64 threads arrived; not there: thread 5\n"
        r"  warp 0: threads 0-4, 6-31 at named_barrier \(faults\.cu:\d+\); thread 5 exited\n"
        r"  warp 1: threads 32-63 at named_barrier"
    ),
    "skipped_barrier": (
        r"deadlock.*\n"
        r"  barrier 0 at sync_threads .*: 63 of 64 threads arrived; not there: thread 37\n"
        r"  barrier 2 at named_barrier .*: 1 of 32 threads arrived; not there: threads 0-36, 38-63\n"
        r"  warp 0: threads 0-31 at sync_threads .*\n"
        r"  warp 1: thread 37 at named_barrier .*; threads 32-36, 38-63 at sync_threads"
    ),
    "divergent_barrier": r"divergent barrier: .*thread 37 at .*all threads of a block must reach the same",
    "differing_counts": r"barrier with differing counts: barrier 1 .*(32|64) threads, the second for (32|64)",
    "count_too_small": r"barrier 1 .* got its 32 threads, but of warp \d threads .* did not take part",
    "count_too_large": r"deadlock.*\n  barrier 1 .*: 32 of 64 threads arrived; not there: threads 32-63\n",
    "odd_count": r"with 48 threads: the count must be a multiple of 32, at most the block's 64",
    "no_such_barrier": r"named_barrier 16: a block has barriers 0 to 15",
    "divergent_collective": r"divergent collective in warp [01]: .* is at .* while threads? .* reached ",
    "differing_types": r"divergent collective in warp [01]: .*operands or types differ",
    "exited_lane": r"shuffle_down \(.*\) needs all 32 lanes of warp 1, but thread 45 exited",
    "collective_against_barrier": r"deadlock.*\n.*\n  warp 0 at shuffle_xor .*: 16 of 32 lanes arrived",
    "half_a_warp": r"shuffle \(.*\) needs all 32 lanes, but warp 1 has only 16 threads",
    "too_little_shared": r"shared_storage of 512 bytes, but the launch asked for 508",
    "write_past_shared": r"wrote 0 bytes behind the end of the block's 512 bytes of shared memory",
}


@pytest.mark.parametrize("name", REPORTED_FAULTS)
def test_fault_is_reported(name: str) -> None:
    for seed in SEEDS:
        with pytest.raises(SimulatorError) as caught:
            run_test_kernel(name, COUNT, 64, seed=seed)
        if seed == 3:
            assert re.search(REPORTED_FAULTS[name], str(caught.value)), str(caught.value)


@both_switches
def test_a_run_after_a_report_is_right(target: str) -> None:
    for name in ("skipped_barrier", "exception"):
        with pytest.raises(RuntimeError):
            run_test_kernel(name, COUNT, 64, target=target)
        assert run_test_kernel("block_sum", [1.0] * 128, 1, target=target) == [128.0]


@both_switches
def test_an_exception_in_a_thread_reaches_the_caller_as_it_is(target: str) -> None:
    with pytest.raises(RuntimeError, match=r"^thrown by thread 20$") as caught:
        run_test_kernel("exception", COUNT, 64, target=target)
    assert not isinstance(caught.value, SimulatorError)


def test_a_missing_barrier_shows() -> None:
    neighbours = [float((i + 1) % 64) for i in range(64)]
    for seed in SEEDS:
        assert run_test_kernel("missing_barrier", COUNT, 64, seed=seed) != neighbours


def test_a_missing_second_barrier_shows() -> None:
    sums = [3.0 * ((i + 1) % 64) + 3 for i in range(64)]
    for seed in SEEDS:
        assert run_test_kernel("missing_second_barrier", COUNT, 64, seed=seed) != sums


def test_a_seed_fixes_the_order_of_threads() -> None:
    def outcomes() -> list[str]:
        return [str(run_test_kernel("missing_barrier", COUNT, 64, seed=seed)) for seed in SEEDS]

    assert outcomes() == outcomes()
    assert len(set(outcomes())) > 4


def test_uninitialised_shared_memory_shows_even_after_arithmetic() -> None:
    output = run_test_kernel("uninitialised_shared", COUNT, 64)
    assert [i for i, value in enumerate(output) if math.isnan(value)] == [11]


def test_unwritten_output_keeps_what_was_there() -> None:
    output = run_test_kernel("unwritten_output", COUNT, 64, fill=math.nan)
    assert [i for i, value in enumerate(output) if math.isnan(value)] == [9]


SANITIZER_FAULTS = {
    "read_past_input": (
        64,
        r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*read_past_input",
    ),
    "write_past_output": (64, r"AddressSanitizer: heap-buffer-overflow[\s\S]*WRITE of size 4"),
    "write_past_shared": (64, r"AddressSanitizer: use-after-poison[\s\S]*WRITE of size 4"),
    "read_past_shared": (64, r"AddressSanitizer: use-after-poison[\s\S]*READ of size 4"),
    "stack_overflow": (64, r"AddressSanitizer: (stack-overflow|SEGV)[\s\S]*descend"),
    "overrun_inside_struct": (64, r"runtime error: index 64 out of bounds for type 'float \[64\]'"),
    "misaligned_access": (68, r"runtime error: .* misaligned address .* requires 16 byte alignment"),
    "skipped_barrier": (64, r"deadlock: no thread can go on"),
    "exception": (64, r"thrown by thread 20"),
}


@pytest.mark.parametrize("name", SANITIZER_FAULTS)
def test_sanitizers_catch(name: str) -> None:
    inputs, message = SANITIZER_FAULTS[name]
    with pytest.raises(SimulatorError) as caught:
        run_test_kernel_sanitized(name, inputs, 64)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("name", "inputs", "outputs"), [("block_sum", 256, 2), ("rotate_halves", 128, 128)])
def test_sanitizers_accept_what_is_right(name: str, inputs: int, outputs: int) -> None:
    expected = run_test_kernel(name, [float(i) for i in range(inputs)], outputs)
    assert run_test_kernel_sanitized(name, inputs, outputs) == expected


def test_files_are_compiled_when_their_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path / "build")
    (tmp_path / "number.h").write_text("constexpr int number = 1;")
    source = tmp_path / "number.cpp"
    source.write_text('#include "number.h"\nextern "C" int get_number() { return number; }')
    target = build.Target("libnumber.so", build.PLAIN, (source,))
    monkeypatch.setattr(build, "targets", lambda: {"number": target})

    def compiled() -> list[bool]:
        said: list[str] = []
        build.build("number", said.append)
        return [not line.startswith("up to date") for line in said]

    assert compiled() == [True, True]
    assert compiled() == [False, False]
    (tmp_path / "number.h").touch()
    assert compiled() == [False, False]
    (tmp_path / "number.h").write_text("constexpr int number = 2;")
    assert compiled() == [True, True]
    assert ctypes.CDLL(str(target.path)).get_number() == 2
    source.write_text("int wrong = no_such_name;")
    with pytest.raises(RuntimeError, match=r"(?s)this command failed:\ng\+\+ .*'?no_such_name"):
        compiled()
