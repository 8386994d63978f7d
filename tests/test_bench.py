"""The bench's arithmetic: statistics, roofline, clocks and inputs. Nothing here asserts a time."""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.roofline import Floor, floor, flops, least_bytes, measure_ceilings, share
from bench.setting import PRECISIONS, Budget
from bench.stats import Summary, geometric_mean, paired_ratio, summarize, verdict
from bench.timing import (
    EventStopwatch,
    RandomPool,
    Rotation,
    Work,
    bound,
    captured,
    interleaved,
    rotating,
    rotation_of,
)
from fused_cna._device_timer import MOST_INPUT_SETS
from tests.bench_cases import CEILINGS, CPU, FORMATS, FakeClock, layer


class TestStats:
    def test_median_and_quartiles(self) -> None:
        assert summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == Summary(3.0, 2.0, 4.0, 5)
        assert summarize([7.0]).spread == 0.0

    def test_nothing_to_summarize(self) -> None:
        with pytest.raises(ValueError, match="at least one sample"):
            summarize([])

    def test_geometric_mean(self) -> None:
        assert geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0)
        for refused in ([], [1.0, 0.0]):
            with pytest.raises(ValueError, match="all positive"):
                geometric_mean(refused)

    def test_ratio_is_taken_round_by_round(self) -> None:
        # The second round was ten times slower for both: no ratio may see it.
        assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Summary(2.0, 2.0, 2.0, 3)
        with pytest.raises(ValueError, match="got 1 and 2"):
            paired_ratio([1.0], [1.0, 2.0])

    @pytest.mark.parametrize(
        ("low", "high", "expected"), [(1.1, 1.3, "faster"), (0.8, 0.9, "slower"), (0.9, 1.1, "even")]
    )
    def test_verdict_needs_both_quartiles(self, low: float, high: float, expected: str) -> None:
        assert verdict(Summary((low + high) / 2, low, high, 9)) == expected


class TestRoofline:
    def test_flops_count_two_per_multiply_add_and_know_groups(self) -> None:
        assert flops(layer(), 3) == 2 * (3 * 4 * 6 * 5) * (8 * 9)
        assert flops(layer(groups=4), 3) * 4 == flops(layer(), 3)

    def test_bytes_count_each_tensor_once(self) -> None:
        image, weight, output, vectors = 2 * 8 * 30, 4 * 8 * 9, 2 * 4 * 30, 4 * 4
        assert least_bytes(layer(), 2, 2) == 2 * (image + weight + output + vectors)
        with_residual = layer(residual="add_act", conv_bias=True)
        assert least_bytes(with_residual, 2, 2) == 2 * (image + weight + 2 * output + vectors + 4)
        assert least_bytes(layer(norm="none", groups=2), 2, 2) == 2 * (image + weight // 2 + output)

    def test_pixels_that_no_tap_meets_are_not_counted(self) -> None:
        strided = layer(kh=1, kw=1, pad_h=0, pad_w=0, stride_h=2, stride_w=2, norm="none")
        assert least_bytes(strided, 1, 1) == 8 * 9 + 4 * 8 + 4 * 9

    def test_the_larger_of_both_times_is_the_floor(self) -> None:
        one = layer()
        memory = least_bytes(one, 1, 4) / 1e9
        assert floor(one, 1, 4, CEILINGS) == Floor(memory, "memory")
        slow_matrix = replace(CEILINGS, flops_per_second=1.0)
        assert floor(one, 1, 4, slow_matrix) == Floor(float(flops(one, 1)), "matrix")

    def test_share(self) -> None:
        assert share(1.0, 4.0) == 0.25

    def test_ceilings_are_measured(self) -> None:
        measured = measure_ceilings(CPU, PRECISIONS["fp32"], seed=0, small=True)
        assert measured.bytes_per_second > 0
        assert measured.flops_per_second > 0
        assert measured.matrix_precision == "float32"


class FakeStream(str):
    def wait_stream(self, other: str) -> None:
        assert self != other


def use_fake_streams(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """Streams that are names. As torch's, a capture whose body raises leaves its stream current."""
    current = ["main"]

    @contextmanager
    def stream(entered: str) -> Iterator[None]:
        before, current[0] = current[0], entered
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(made: object) -> Iterator[None]:
        before, current[0] = current[0], "capture"
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream("side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(current[0]))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))


class TestTiming:
    def test_interleaves_and_divides_by_calls(self) -> None:
        clock, order = FakeClock(), []

        def work(name: str, seconds: float) -> Callable[[], None]:
            def run() -> None:
                order.append(name)
                clock.spend(seconds)

            return run

        works = {"a": Work(work("a", 1.0), calls=4), "b": Work(work("b", 2.0))}
        samples = interleaved(works, clock, rounds=2, sample_seconds=3.0, warmup=1)
        assert samples == {"a": [0.25, 0.25], "b": [2.0, 2.0]}
        # Warm-up and a trial each; then 3 and 2 repeats fill a sample; round two begins with the other.
        assert "".join(order) == "aabb" + "aaabb" + "bbaaa"

    def test_a_slow_machine_makes_fewer_rounds(self) -> None:
        clock = FakeClock()
        works = {"a": Work(lambda: clock.spend(2.0)), "b": Work(lambda: clock.spend(1.0))}
        for limit, rounds in ((1.0, 3), (10.0, 4), (1000.0, 9)):
            samples = interleaved(works, clock, rounds=9, sample_seconds=0.0, limit_seconds=limit)
            assert [len(samples[name]) for name in works] == [rounds, rounds]

    def test_what_follows_a_sample_is_not_timed(self) -> None:
        clock = FakeClock()
        works = {"a": Work(lambda: clock.spend(1.0))}
        samples = interleaved(
            works, clock, rounds=3, sample_seconds=0.0, after_sample=lambda: clock.spend(100.0)
        )
        assert samples == {"a": [1.0, 1.0, 1.0]}

    def test_inputs_and_outputs_rotate(self) -> None:
        inputs = [torch.tensor(value) for value in (1.0, 2.0, 3.0)]
        recent: deque[Tensor] = deque(maxlen=2)
        work = rotating(bound(lambda x: x + 1, [(x,) for x in inputs]), recent)
        for _ in range(4):
            work.run()
        assert [float(output) for output in recent] == [4.0, 2.0]

    def test_sets_outrun_the_cache_three_times(self) -> None:
        assert rotation_of(100, 1000) == Rotation(30, 100, 1000)
        assert rotation_of(10**9, 1000).sets == 2
        small = rotation_of(1000, 10**9)
        assert small.sets == MOST_INPUT_SETS
        assert [one.outruns_cache for one in (rotation_of(100, 1000), small)] == [True, False]

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_pool_gives_separate_aligned_tensors(self, memory_format: torch.memory_format) -> None:
        shapes = [(1, 3, 5, 7), (2, 4, 3, 3)]
        sets = RandomPool(CPU, torch.float16, seed=0).input_sets(shapes, 3, memory_format)
        tensors = list(itertools.chain(*sets))
        assert [tuple(tensor.shape) for tensor in tensors] == shapes * 3
        assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in tensors)
        starts = [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors]
        assert all(start % 256 == 0 for start in starts)
        ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        assert all(tensor.float().std() > 0.5 for tensor in tensors)

    def test_events_give_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("record")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                assert end is not self
                return 1500.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        assert EventStopwatch().seconds(lambda: log.append("work")) == 1.5
        assert log == ["record", "work", "record", "wait"]

    def test_a_graph_holds_every_call_and_each_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []
        use_fake_streams(monkeypatch, log)
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

        def call(x: Tensor) -> Tensor:
            log.append(f"{int(x)} on {torch.cuda.current_stream()}, {len(alive)} outputs")
            alive.add(output := x + 1)
            return output

        graph = captured(bound(call, [(torch.tensor(index),) for index in range(3)]))
        warmup = ["0 on side, 0 outputs"] * 3
        assert log == [*warmup, "synchronize", *(f"{n} on capture, {n} outputs" for n in range(3))]
        assert int(graph.first_output) == 1
        assert graph.work.calls == 3

    def test_a_capture_that_fails_restores_the_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use_fake_streams(monkeypatch, [])

        def call() -> Tensor:
            if torch.cuda.current_stream() == "capture":
                raise RuntimeError("not permitted")
            return torch.ones(1)

        with pytest.raises(RuntimeError, match="not permitted"):
            captured([call])
        assert torch.cuda.current_stream() == "main"

    def test_budget(self) -> None:
        clock = FakeClock()
        budget = Budget(10.0, clock=lambda: clock.now)
        clock.spend(6.0)
        assert budget.allows()
        assert not budget.allows(keep=5.0)
        clock.spend(4.0)
        assert not budget.allows()
        assert Budget(None).allows(keep=1e9)


class TestPrecision:
    @pytest.mark.parametrize(("name", "inside"), [("tf32", "tf32"), ("fp32", "ieee"), ("fp16", "before")])
    def test_switches_are_set_inside_agree_and_are_put_back(self, name: str, inside: str) -> None:
        def switches() -> tuple[object, ...]:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            newer = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision)
            return (*newer, cudnn.allow_tf32, matmul.allow_tf32)

        before = switches()
        with PRECISIONS[name].applied():
            expected = before if inside == "before" else (*[inside] * 3, *[inside == "tf32"] * 2)
            assert switches() == expected
        assert switches() == before

    def test_names_and_types(self) -> None:
        assert {name: one.dtype for name, one in PRECISIONS.items()} == {
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
            "tf32": torch.float32,
            "fp32": torch.float32,
        }
