"""The layers job: what is checked, timed, left out, broken off, resumed, and what it comes to."""

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import layers
from bench.layer_result import BASELINE, LayerResult
from bench.plans import Plan
from bench.roofline import Ceilings
from bench.routes import Call, Case, Fused, Route, ThreeStep
from bench.rows import Row, layers_of
from bench.setting import Budget
from bench.summary import LayersResult
from bench.timing import RandomPool, Rotation
from tests.bench_cases import CEILINGS, CPU, FORMATS, FakeClock, layer, layer_result, row, setting, two_sets
from tests.reference import library_bound

SMALL = layer(h=6, w=6)


class Broken(Fused):
    """A fused route that leaves a pixel wrong."""

    def prepare(self, case: Case) -> Call:
        call = super().prepare(case)

        def wrong(*inputs: Tensor) -> Tensor:
            output = call(*inputs)
            output[0, 0, 0, 0] += 1
            return output

        return wrong


class Refusing(ThreeStep):
    """A rival that its library does not support."""

    name = "refusing"

    def prepare(self, case: Case) -> Call:
        raise RuntimeError("no engine for this\nand more lines")


class TestLayers:
    def measure(self, routes: tuple[Route, ...], monkeypatch: pytest.MonkeyPatch) -> LayerResult:
        monkeypatch.setattr(layers, "ROUTES", routes)
        monkeypatch.setattr(layers, "rotation_of", two_sets)
        pool = RandomPool(CPU, torch.float32, seed=0)
        return layers.measure(row(SMALL), setting(), pool, CEILINGS)

    def test_both_formats_are_checked_and_timed_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.measure((Fused(), ThreeStep(), Refusing()), monkeypatch)
        assert result.failure is None
        assert {(one.route, one.memory_format) for one in result.entries} == {
            (route, memory_format)
            for route in ("fused", BASELINE, "refusing")
            for memory_format in ("channels_last", "contiguous_format")
        }
        timed = [one for one in result.entries if one.route != "refusing"]
        eager_error = max(one.error for one in timed if one.route == BASELINE)
        assert all(0 < one.error <= library_bound(torch.float32, eager_error) for one in timed)
        assert all(len(one.samples["launched"]) == 3 for one in timed)
        assert all(one.first_call_seconds is not None for one in timed)
        assert [one.refused for one in result.entries if one.route == "refusing"] == [
            "RuntimeError: no engine for this"
        ] * 2
        assert result.comparisons["launched"].rival == BASELINE

    @pytest.mark.parametrize(("precision", "products"), [("tf32", "tf32"), ("fp32", "ieee")])
    def test_routes_run_in_the_precision_of_the_row_and_they_alone_search_algorithms(
        self, precision: str, products: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: set[tuple[str, bool]] = set()

        class Watching(ThreeStep):
            def prepare(self, case: Case) -> Call:
                call = super().prepare(case)

                def watched(*inputs: Tensor) -> Tensor:
                    seen.add((torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark))
                    return call(*inputs)

                return watched

        searched: list[bool] = []
        reference = layers.reference

        def watched_reference(*arguments: Any) -> Tensor:
            searched.append(torch.backends.cudnn.benchmark)
            return reference(*arguments)

        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        monkeypatch.setattr(layers, "reference", watched_reference)
        monkeypatch.setattr(layers, "ROUTES", (Watching(),))
        monkeypatch.setattr(layers, "rotation_of", two_sets)
        pool = RandomPool(CPU, torch.float32, seed=0)
        layers.measure(row(SMALL, precision=precision), setting(), pool, CEILINGS)
        assert seen == {(products, True)}
        assert searched == [False] * len(FORMATS)

    def test_every_call_of_a_pass_has_tensors_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in fused_cna.tune: what is called again at once would still lie in the cache."""
        operands: list[tuple[int, ...]] = []
        outputs: list[int] = []

        class Watching(ThreeStep):
            def prepare(self, case: Case) -> Call:
                call = super().prepare(case)

                def watched(*inputs: Tensor) -> Tensor:
                    output = call(*inputs)
                    if output.is_contiguous():
                        operands.append(tuple(t.data_ptr() for t in (*inputs, case.conv.weight)))
                    outputs.append(output.data_ptr())
                    return output

                return watched

        measured = row(layer(residual="add_act", h=40, w=40))
        monkeypatch.setattr(layers, "ROUTES", (Watching(),))
        monkeypatch.setattr(layers, "rotation_of", lambda size, cache: Rotation(3, size, cache))
        result = layers.measure(measured, setting(), RandomPool(CPU, torch.float32, seed=0), CEILINGS)
        assert len(set(itertools.chain(*operands[-3:]))) == 9
        assert len(set(outputs[-3:])) == 3
        sizes = 8 * 40 * 40 * 2 + 2 * 4 * 40 * 40 * 2 + 4 * 8 * 9
        assert result.rotation.set_bytes == 4 * sizes

    def test_a_wrong_pixel_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.measure((Broken(), ThreeStep()), monkeypatch)
        assert "wrong result" in str(result.failure)
        assert result.comparisons == {}


class TestRun:
    """The order of work, with a clock that only measuring moves and nothing really measured."""

    @pytest.fixture(autouse=True)
    def nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.measured: list[str] = []

        def measure(measured: Row, *_: object) -> LayerResult:
            self.measured.append(measured.key)
            self.clock.spend(1.0)
            return layer_result(2.0, measured)

        monkeypatch.setattr(layers, "measure_ceilings", lambda *_, **__: CEILINGS)
        monkeypatch.setattr(layers, "measure", measure)

    def budget(self, seconds: float) -> Budget:
        return Budget(seconds, clock=lambda: self.clock.now)

    def test_a_layer_that_breaks_off_is_a_failure_and_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measure(measured: Row, *_: object) -> LayerResult:
            if measured.layer.depthwise:
                raise RuntimeError("no engine\nand more")
            return layer_result(2.0, measured)

        monkeypatch.setattr(layers, "measure", measure)
        result = layers.run(setting(), lambda name: None)
        depthwise = [f"fp32 n2 {one.name}" for one in layers_of("quick") if one.depthwise]
        assert depthwise
        assert result.failures == [f"{name}: RuntimeError: no engine" for name in depthwise]
        assert len(result.results) + len(depthwise) == len(layers_of("quick"))

    @pytest.mark.parametrize(("always", "tries"), [(True, 2), (False, 1)])
    def test_what_does_not_fit_is_tried_with_free_memory_then_listed(
        self, always: bool, tries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused: list[str] = []

        def measure(measured: Row, *_: object) -> LayerResult:
            if measured.layer.depthwise and (always or measured.key not in refused):
                refused.append(measured.key)
                raise torch.OutOfMemoryError("no memory")
            return layer_result(2.0, measured)

        monkeypatch.setattr(layers, "measure", measure)
        result = layers.run(setting(), lambda name: None)
        depthwise = [f"fp32 n2 {one.name}" for one in layers_of("quick") if one.depthwise]
        assert result.too_large == (depthwise if always else [])
        assert len(refused) == tries * len(depthwise)
        assert result.failures == []

    def test_a_budget_leaves_out_the_end_by_name(self) -> None:
        result = layers.run(setting(budget=self.budget(4.0)), lambda name: None)
        names = [f"fp32 n2 {one.name}" for one in layers_of("quick")]
        assert [one.name for one in result.results] == names[:4]
        assert result.left_out == names[4:]

    def test_nothing_measured(self) -> None:
        result = layers.run(setting(budget=1e-9), lambda name: None)
        assert result.results == []
        assert result.as_json()["groups"] == []

    def test_a_resumed_run_measures_only_the_rest(self) -> None:
        first = layers.run(setting(budget=self.budget(4.0)), lambda name: None)
        written = json.loads(json.dumps(first.as_json()))
        earlier = [LayerResult.from_json(one) for one in written["rows"]]
        ceilings = {name: Ceilings(**values) for name, values in written["ceilings"].items()}
        before = list(self.measured)
        self.measured.clear()
        second = layers.run(setting(), lambda name: None, earlier=earlier, earlier_ceilings=ceilings)
        assert not set(self.measured) & set(before)
        assert len(self.measured) == len(layers_of("quick")) - 4
        whole = layers.run(setting(), lambda name: None)
        assert [one.row.key for one in second.results] == [one.row.key for one in whole.results]
        assert (second.resumed, second.left_out) == (4, [])
        assert second.groups() == whole.groups()

    def test_what_was_measured_for_other_suites_stays(self) -> None:
        earlier = layers.run(setting(batches=(5,)), lambda name: None).results
        result = layers.run(setting(), lambda name: None, earlier=earlier)
        assert len(result.results) == 2 * len(layers_of("quick"))
        assert {(group.suite, group.batch) for group in result.groups()} == {("quick", 5), ("quick", 2)}

    def test_unfinished_results_are_saved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "SECONDS_BETWEEN_SAVES", -1.0)
        saved: list[int] = []
        layers.run(setting(), lambda name: None, save=lambda result: saved.append(len(result.results)))
        assert saved == list(range(1, 1 + len(layers_of("quick"))))

    def test_steps_announced_cover_the_steps_made(self) -> None:
        steps: list[str] = []
        made = setting(suites=("default", "quick"), batches=(1, 2))
        layers.run(made, steps.append)
        assert len(steps) == layers.most_steps(made)


class TestJson:
    def test_a_result_comes_back_as_it_was(self) -> None:
        measured = layer_result(0.5, failure="it broke", plan=Plan("H100", "direct", (8, 8, 4), 1, 2.5))
        measured.entries[0].error = float("inf")
        read = LayerResult.from_json(json.loads(json.dumps(measured.as_json())))
        for one in measured.entries:
            one.samples = {}
        assert read == measured


class TestSummary:
    def result(self) -> LayersResult:
        first, second = row(layer(), twice=2, once=1), row(layer(cout=6), twice=1)
        return LayersResult(
            {"twice": "here", "once": "there"},
            {"fp32": CEILINGS},
            planned={
                ("twice", 2, "fp32"): {first.key: 2e-4, second.key: 1e-4, "not measured": 1e-4},
                ("once", 2, "fp32"): {first.key: 1e-4},
            },
            results=[layer_result(2.0, first), layer_result(0.5, second)],
        )

    def test_losses_come_first(self) -> None:
        result = self.result()
        assert [one.row.layer.cout for one in result.ordered("graph")] == [6, 4]
        assert [len(names) for names in result.by_verdict("graph").values()] == [1, 0, 1]
        assert result.launches == ["graph", "launched"]

    def test_groups(self) -> None:
        result = self.result()
        twice, once = [group for group in result.groups() if group.launch == "graph"]
        assert (twice.suite, twice.measured, twice.planned) == ("twice", 2, 3)
        assert twice.floor_covered == pytest.approx(0.75)
        assert twice.geometric_mean == pytest.approx(1.0)
        assert twice.geometric_mean_to_baseline == pytest.approx(4.0)
        # Two uses of 1 ms against 2 ms, and one of 1 ms against 0.5 ms.
        assert twice.speedup_of_sum == pytest.approx(4.5 / 3)
        assert twice.floor_share == pytest.approx(0.1)
        assert (twice.worst, twice.worst_speedup) == (layer(cout=6).name, 0.5)
        assert (twice.slower, twice.even, twice.faster) == (1, 0, 1)
        assert (once.measured, once.geometric_mean, once.floor_covered) == (1, pytest.approx(2.0), 1.0)
