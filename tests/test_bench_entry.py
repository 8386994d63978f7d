"""What is checked of a route before its time counts: its answers, what a CUDA graph writes, its bound."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import entry as entries
from bench.checks import POISON, checked_images, error_of, first_call, largest_image_error
from bench.entry import Entry, attempt, judge, works_of
from bench.setting import PRECISIONS
from bench.timing import CapturedCalls, Work
from fused_cna._accuracy import error_bound

GPU = torch.device("cuda")
EAGER = "eager"
ONES = torch.ones(1, 4)


def entry(route: str = "fused", error: float | None = None, **changes: Any) -> Entry:
    return replace(Entry(route, "channels_last", ours=route == "fused", error=error), **changes)


class TestChecks:
    def test_largest_error_of_an_image(self) -> None:
        expected = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64)
        assert largest_image_error(torch.tensor([[3.0, 4.0], [3.0, 4.5]]), expected) == pytest.approx(0.1)

    def test_a_first_call_is_timed_and_poisoned(self) -> None:
        output = torch.ones(8)
        assert first_call(lambda: output) > 0
        assert (output == POISON).all()

    def test_checked_images_are_spread_and_hold_both_ends(self) -> None:
        assert checked_images(1) == [0]
        assert checked_images(3) == [0, 1, 2]
        spread = checked_images(128)
        assert (len(spread), spread[0], spread[-1]) == (8, 0, 127)
        assert len(set(spread)) == 8

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_an_image_between_the_checked_ones_must_be_finite(self, bad: float) -> None:
        output = torch.ones(32, 1, 1, 1)
        expected = torch.ones(8, 1, 1, 1, dtype=torch.float64)
        assert error_of(output, expected) == 0.0
        assert 1 not in checked_images(32)
        output[1] = bad
        assert error_of(output, expected) == torch.inf


class TestGraph:
    def works(self, monkeypatch: pytest.MonkeyPatch, captured: Any) -> tuple[Entry, dict[str, Work]]:
        monkeypatch.setattr(entries, "captured", captured)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        made = entry(error=1e-9)
        return made, works_of(made, [lambda: ONES], lambda y: error_of(y, ONES.double()), GPU)

    @pytest.mark.parametrize(("writes", "error"), [(ONES, 1e-9), (3 * ONES, 2.0), (None, POISON - 1)])
    def test_what_it_writes_is_checked(
        self, writes: torch.Tensor | None, error: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = torch.ones(1, 4)
        graph: Any = SimpleNamespace(replay=lambda: None if writes is None else output.copy_(writes))
        made, works = self.works(
            monkeypatch, lambda calls: CapturedCalls(graph, output, Work(graph.replay, len(calls)))
        )
        assert set(works) == {"launched", "graph"}
        assert made.error == pytest.approx(error)

    def test_what_cannot_be_captured_is_timed_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(calls: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        made, works = self.works(monkeypatch, refuse)
        assert set(works) == {"launched"}
        assert made.no_graph == "RuntimeError: operation not permitted when stream is capturing"
        assert made.refused is None

    def test_a_lost_device_ends_the_run_and_a_refusal_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def raises(*_: object) -> Any:
            raise RuntimeError("an illegal memory access")

        made = entry()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        assert attempt(made, GPU, raises) == {}
        assert made.refused == "RuntimeError: an illegal memory access"
        monkeypatch.setattr(torch.cuda, "synchronize", raises)
        with pytest.raises(RuntimeError):
            attempt(entry(), GPU, raises)


class TestJudge:
    @pytest.mark.parametrize("name", PRECISIONS)
    @pytest.mark.parametrize("room", [1, 2])
    def test_ours_is_held_to_the_contract(self, name: str, room: int) -> None:
        bound = error_bound(PRECISIONS[name].dtype, name == "tf32", 1e-9)
        assert bound < 1e-5 if name == "fp32" else bound < 4e-3
        for times, wrong in ((0.99, False), (3.9, True)):
            ours, rival = (entry(route, error=room * times * bound) for route in ("fused", "rival"))
            failure = judge([entry(EAGER, 1e-9), ours, rival], PRECISIONS[name], (EAGER,), room)
            assert (failure is not None) == wrong == (ours.refused is not None)
            assert rival.refused is None

    def test_eager_of_the_same_format_sets_the_bound(self) -> None:
        eager, other = entry(EAGER, 1e-3), entry(EAGER, 1e-6, memory_format="contiguous_format")
        ours = [entry(error=1e-3), entry(error=1e-3, memory_format="contiguous_format")]
        failure = judge([eager, other, *ours], PRECISIONS["fp32"], (EAGER,))
        assert str(failure).startswith("fused (contiguous_format): wrong result: relative error 1.00e-03")
        assert [one.refused is None for one in ours] == [True, False]

    def test_an_eager_result_that_is_not_finite_permits_nothing(self) -> None:
        broken = [entry(route, torch.inf) for route in (EAGER, "fused")]
        assert judge(broken, PRECISIONS["fp16"], (EAGER,)) is not None

    def test_a_wrong_rival_is_not_timed_but_no_failure(self) -> None:
        rival = entry("rival", 1.0, no_graph="RuntimeError: no")
        assert judge([entry(EAGER, 1e-7), rival], PRECISIONS["fp32"], (EAGER,)) is None
        assert "wrong result" in str(rival.refused)

    def test_ours_has_to_run_and_in_a_cuda_graph_too(self) -> None:
        refused, not_captured = entry(refused="FusionError: no"), entry(no_graph="RuntimeError: no")
        assert judge([refused, not_captured], PRECISIONS["fp32"], (EAGER,)) == (
            "fused (channels_last): FusionError: no; fused (channels_last): not in a CUDA graph: "
            "RuntimeError: no"
        )
