"""The bench's arithmetic: statistics, the contract, suites, the roofline, clocks. Nothing asserts a time."""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import networks
from bench.cases import (
    PRECISIONS,
    SUITES,
    SWEPT_FILTERS,
    SWEPT_WIDTHS,
    Layer,
    Row,
    layers_of,
    ordered_rows,
    parse,
    read_rows,
    select,
)
from bench.jobs import measure_ceilings
from bench.measure import (
    Budget,
    Work,
    allowed_error,
    captured,
    checked_images,
    error_of,
    first_call,
    input_sets,
    interleaved,
    judge,
    rotating,
    rotation_of,
)
from bench.overhead import split
from bench.provenance import git_state
from bench.result import Outcome, Record, Summary, geometric_mean, paired_ratio, summarize
from bench.routes import BASELINE
from fused_cna._accuracy import error_bound
from tests.bench_cases import CEILINGS, CPU, FACTS, FakeClock, entry, layer, record, setting


class TestStatistics:
    def test_median_quartiles_and_means(self) -> None:
        assert summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == Summary(3.0, 2.0, 4.0, 5)
        assert summarize([7.0]) == Summary(7.0, 7.0, 7.0, 1)
        assert geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0)
        # The second round was ten times slower for both: no ratio may see it.
        assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Summary(2.0, 2.0, 2.0, 3)

    @pytest.mark.parametrize("bad", [lambda: summarize([]), lambda: geometric_mean([1.0, 0.0])])
    def test_nothing_to_sum_up(self, bad: Any) -> None:
        with pytest.raises(ValueError, match="at least one"):
            bad()

    def test_a_verdict_needs_both_quartiles(self) -> None:
        assert [Summary(1.2, *ends, 9).verdict for ends in ((1.1, 1.3), (0.8, 0.9), (0.9, 1.3))] == [
            "faster",
            "slower",
            "even",
        ]

    def test_the_fastest_rival_counts_by_round_and_a_wrong_one_does_not(self) -> None:
        made = record(
            entry("fused", 2.0, 20.0),
            entry(BASELINE, 6.0, 60.0),
            entry("folded", 4.0, 40.0),
            entry("wrong", 1.0, 1.0, refused="wrong"),
            facts={**FACTS, "floor": {"seconds": 5.5, "bound": "memory"}},
        )
        found = made.comparisons["launched"]
        assert (found.rival, found.speedup, found.verdict) == ("folded", Summary(2.0, 2.0, 2.0, 2), "faster")
        assert found.roofline_share == 0.5
        assert made.routes[0].speedups["launched"].median == 3.0
        assert made.routes[2].speedups["launched"].median == 1.5
        assert record(entry("fused", 2.0)).comparisons == {}

    def test_a_record_comes_back_from_json(self) -> None:
        made = record(entry("fused", 2.0, error=float("inf")), entry(BASELINE, 4.0), failure="it broke")
        read = Record.from_json(made.as_json(), "layer")
        for one in made.routes:
            one.samples = {}
        assert read == made

    def test_suites_are_summed_up(self) -> None:
        first = record(entry("fused", 1e-3), entry(BASELINE, 2e-3), name="a", uses={"twice": 2, "once": 1})
        second = record(entry("fused", 1e-3), entry(BASELINE, 5e-4), name="b", uses={"twice": 1})
        planned = {("twice", 2, "fp32"): {"a": 2e-4, "b": 1e-4, "c": 1e-4}, ("once", 2, "fp32"): {"a": 1e-4}}
        outcome = Outcome([first, second], planned=planned)
        assert [one.name for one in outcome.ordered("launched")] == ["b", "a"]
        twice, once = outcome.groups()
        assert (twice["measured"], twice["planned"], twice["worst"], twice["slower"]) == (2, 3, "b", 1)
        assert twice["floor_covered"] == pytest.approx(0.75)
        assert twice["geometric_mean"] == pytest.approx(1.0)
        # Two uses of 1 ms against 2 ms, and one of 1 ms against 0.5 ms.
        assert twice["speedup_of_sum"] == pytest.approx(4.5 / 3)
        assert twice["floor_share"] == pytest.approx(0.1)
        assert (once["measured"], once["floor_covered"]) == (1, 1.0)


class TestContract:
    @pytest.mark.parametrize("name", PRECISIONS)
    def test_ours_is_held_to_it_and_a_rival_to_much_less(self, name: str) -> None:
        precision = PRECISIONS[name]
        bound = error_bound(precision.dtype, name == "tf32", 1e-9)
        assert allowed_error(float("inf"), precision) == bound
        for times, wrong in ((0.99, False), (1.9, True)):
            made = record(entry(BASELINE, error=1e-9), entry("fused", error=times * bound), entry("rival"))
            made.precision = name
            made.routes[2].error = times * bound
            assert (judge(made) is not None) == wrong == (made.routes[1].refused is not None)
            made.kind, made.routes[1].refused = "network", None
            assert judge(made) is None
            assert made.routes[2].refused is None

    def test_eager_of_the_same_format_sets_the_bound(self) -> None:
        other = {"memory_format": "contiguous_format"}
        made = record(
            entry(BASELINE, error=1e-3),
            entry(BASELINE, error=1e-6, **other),
            entry("fused", error=1e-3),
            entry("fused", error=1e-3, **other),
        )
        assert str(judge(made)).startswith("fused (contiguous_format): wrong result")
        assert made.routes[2].refused is None

    def test_ours_has_to_run_and_in_a_cuda_graph_too(self) -> None:
        made = record(entry("fused", refused="it raised"), entry("fused", no_graph="not captured"))
        said = str(judge(made))
        assert "it raised" in said
        assert "not captured" in said

    def test_what_is_not_finite_or_not_written_shows(self) -> None:
        output, expected = torch.ones(32, 1, 1, 1), torch.ones(8, 1, 1, 1, dtype=torch.float64)
        assert error_of(output, expected) == 0.0
        assert checked_images(32)[0::7] == [0, 31]
        assert 1 not in checked_images(32)
        output[1] = torch.nan
        assert error_of(output, expected) == torch.inf
        two = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64)
        assert error_of(torch.tensor([[3.0, 4.0], [3.0, 4.5]]), two, by_image=True) == pytest.approx(0.1)
        first_call(lambda: output)
        assert output.min() > 1e3


class TestSuites:
    def test_every_role_has_a_layer_of_its_own(self) -> None:
        chosen = layers_of("default")
        assert len({one.name for one in chosen}) == len(chosen) == 27
        assert layers_of("quick") == chosen[:8]
        assert {one.kh for one in chosen if one.depthwise} == {3, 5, 7}
        assert {one.residual_order for one in chosen} == {None, "add_act", "act_add"}
        assert {bool(1 < one.groups < one.cin) for one in chosen} == {True, False}

    def test_the_most_used_row_of_at_least_two_networks_is_chosen(self) -> None:
        row = next(row for row in read_rows() if row["kind"] == "depthwise") | {"kh": "3"}
        rows = [
            row | {"uses": "9", "models": "1", "cin": "1"},
            row | {"uses": "5", "models": "2", "cin": "2"},
            row | {"uses": "7", "models": "2", "cin": "3"},
            row | {"uses": "8", "models": "2", "kh": "5"},
        ]
        assert select("a role | depthwise | kh=3", rows) == parse(rows[2] | {"uses": "1"}, "a role")
        with pytest.raises(LookupError, match="role"):
            select("none | depthwise | kh=11", rows)

    @pytest.mark.parametrize("suite", SUITES)
    def test_output_sizes_are_those_of_torch(self, suite: str) -> None:
        for one in layers_of(suite):
            conv = nn.Conv2d(one.cin, one.cout, (one.kh, one.kw), *one.geometry, device="meta")
            y = conv(torch.empty(one.shapes(1)[0], device="meta"))
            assert y.shape[2:] == (one.out_h, one.out_w)

    def test_sweeps_are_depthwise_and_grouped(self) -> None:
        depthwise, grouped = layers_of("depthwise"), layers_of("grouped")
        wanted = sorted(itertools.product(SWEPT_FILTERS, SWEPT_WIDTHS))
        assert sorted((one.kh, one.h) for one in depthwise) == wanted
        assert sorted((one.kh, one.cin // one.groups) for one in grouped) == wanted
        assert all(one.depthwise for one in depthwise)
        assert all(1 < one.groups < one.cin for one in grouped)
        with pytest.raises(ValueError, match="depthwise, grouped"):
            layers_of("everything")

    def test_networks_go_first_by_their_share_and_none_twice(self) -> None:
        rows = ordered_rows(("resnet50", "quick"), (1, 2), {"fp32": CEILINGS})
        assert len({row.key for row in rows}) == len(rows)
        alone = ordered_rows(("resnet50",), (1,), {"fp32": CEILINGS})
        shares = [row.uses["resnet50"] * row.floor(CEILINGS)[0] for row in alone]
        assert shares == sorted(shares, reverse=True)
        assert any(len(row.uses) == 2 for row in rows)
        assert [row.batch for row in rows[:4:2]] == [1, 2]

    def test_names(self) -> None:
        names = {
            "3x3 4 @6 BN ReLU": layer(cin=4),
            "dw 3x3 s2 8 @6 BN ReLU": layer(groups=8, cout=8, stride_h=2, stride_w=2),
            "3x3 d2 g2 8->4 @6 BN add ReLU": layer(groups=2, dil_h=2, residual="add_act"),
            "3x3 8->4 @6 bias add": layer(norm="none", conv_bias=True, act="none", residual="act_add"),
        }
        assert list(names) == [one.name for one in names.values()]


class TestRoofline:
    def test_operations_and_bytes_are_counted(self) -> None:
        assert layer().flops(3) == 2 * (3 * 4 * 6 * 5) * (8 * 9)
        assert layer(groups=4).flops(3) * 4 == layer().flops(3)
        image, weight, output, vectors = 2 * 8 * 30, 4 * 8 * 9, 2 * 4 * 30, 4 * 4
        assert layer().least_bytes(2, 2) == 2 * (image + weight + output + vectors)
        with_residual: Layer = layer(residual="add_act", conv_bias=True)
        assert with_residual.least_bytes(2, 2) == 2 * (image + weight + 2 * output + vectors + 4)
        # Pixels that no tap meets are not read.
        strided = layer(kh=1, kw=1, pad_h=0, pad_w=0, stride_h=2, stride_w=2, norm="none")
        assert strided.least_bytes(1, 1) == 8 * 9 + 4 * 8 + 4 * 9

    def test_the_larger_of_both_times_is_the_floor(self) -> None:
        row = Row(layer(), 1, "fp32")
        assert row.floor(CEILINGS) == (layer().least_bytes(1, 4) / 1e9, "memory")
        assert row.floor(CEILINGS | {"flops_per_second": 1.0}) == (float(layer().flops(1)), "matrix")
        assert measure_ceilings(setting(), PRECISIONS["fp32"], small=True)["flops_per_second"] > 0


class TestTiming:
    def test_works_take_turns_and_are_divided_by_their_calls(self) -> None:
        clock, order = FakeClock(), list[str]()

        def work(name: str, seconds: float) -> Any:
            return lambda: (order.append(name), clock.spend(seconds))

        works = {"a": Work(work("a", 1.0), calls=4), "b": Work(work("b", 2.0))}
        samples = interleaved(works, clock.seconds, rounds=2, sample_seconds=3.0, warmup=1)
        assert samples == {"a": [0.25, 0.25], "b": [2.0, 2.0]}
        # Warm-up and a trial each; then 3 and 2 repeats fill a sample; round two begins with the other.
        assert "".join(order) == "aabb" + "aaabb" + "bbaaa"

    @pytest.mark.parametrize(("limit", "rounds"), [(1.0, 3), (10.0, 4), (1000.0, 9)])
    def test_a_slow_machine_makes_fewer_rounds(self, limit: float, rounds: int) -> None:
        clock = FakeClock()
        works = {"a": Work(lambda: clock.spend(2.0)), "b": Work(lambda: clock.spend(1.0))}
        later = {"after_sample": lambda: clock.spend(100.0)}
        samples = interleaved(works, clock.seconds, rounds=9, limit_seconds=limit, **later)  # type: ignore[arg-type]
        assert samples == {"a": [2.0] * rounds, "b": [1.0] * rounds}

    def test_inputs_and_outputs_rotate(self) -> None:
        inputs = [torch.tensor(value) for value in (1.0, 2.0)]
        recent: deque[Tensor] = deque()
        work = rotating([lambda x=x: x + 1 for x in inputs], recent)
        for _ in range(4):
            work.run()
        assert [float(output) for output in recent] == [2.0, 3.0]

    def test_sets_outrun_the_cache_as_far_as_their_number_allows(self) -> None:
        found = [rotation_of(size, CPU) for size in (1 << 20, 1 << 40, 1)]
        assert [one["sets"] for one in found] == [96, 2, 256]
        assert [one["outruns_cache"] for one in found] == [True, True, False]
        sets = input_sets([(1, 3, 5, 7), (2, 4, 3, 3)], 3, torch.channels_last, torch.empty(1).half())
        tensors = list(itertools.chain(*sets))
        assert len({tensor.data_ptr() for tensor in tensors}) == 6
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)

    def test_a_graph_holds_every_output_and_a_failed_capture_restores_the_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        main = SimpleNamespace(wait_stream=lambda other: None)
        current: list[object] = [main]

        @contextmanager
        def graph(made: object) -> Iterator[None]:
            current[0] = "capture"  # as torch's, it stays current where the body raises
            yield
            current[0] = main

        monkeypatch.setattr(torch.cuda, "Stream", lambda: main)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
        monkeypatch.setattr(torch.cuda, "set_stream", partial(current.__setitem__, 0))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        _, output = captured([lambda i=i: torch.full((1,), i) for i in (7, 8)])
        assert int(output) == 7

        def refuse() -> Tensor:
            if current[0] == "capture":
                raise RuntimeError("not permitted")
            return torch.ones(1)

        with pytest.raises(RuntimeError, match="not permitted"):
            captured([refuse])
        assert current[0] is main

    def test_budget(self) -> None:
        clock = FakeClock()
        budget = Budget(10.0, clock=lambda: clock.now)
        clock.spend(6.0)
        assert (budget.allows(), budget.allows(keep=5.0)) == (True, False)
        clock.spend(4.0)
        assert not budget.allows()
        unlimited = Budget(None)
        assert unlimited.allows(keep=1e9)
        unlimited.interrupted = True
        assert not unlimited.allows()

    @pytest.mark.parametrize(("name", "inside"), [("tf32", "tf32"), ("fp32", "ieee"), ("fp16", "before")])
    def test_switches_agree_inside_and_are_put_back(self, name: str, inside: str) -> None:
        def switches() -> tuple[object, ...]:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            newer = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision)
            return (*newer, cudnn.allow_tf32, matmul.allow_tf32)

        before = switches()
        with PRECISIONS[name].applied():
            assert switches() == (before if inside == "before" else (*[inside] * 3, *[inside == "tf32"] * 2))
        assert switches() == before

    def test_parts_of_a_call(self) -> None:
        dry = {"module": [4.0, 5.0], "arranged": [3.0, 3.0], "by torch.ops": [6.0, 6.0]}
        medians = {name: one.median for name, one in split(dry, [[0.25] * 5] * 2, [7.0, 8.0]).items()}
        assert medians == {
            "module": 1.5,
            "dispatch": 1.75,
            "launch": 3.0,
            "all": 7.5,
            "by torch.ops": 6.0,
            **dict.fromkeys(("checks", "arguments", "allocation", "plan", "launch preparation"), 0.25),
        }
        assert split(dry, [[0.25] * 5] * 2, None)["all"].median == 4.5


class TestNetworks:
    def test_photographs_become_different_normalised_crops(self) -> None:
        pytest.importorskip("sklearn", reason="the photographs ship inside scikit-learn")
        images = networks.photographs()
        batch = networks.crops(images, 4, 32, seed=3)
        assert batch.shape == (4, 3, 32, 32)
        assert -2.2 < float(batch.min()) < float(batch.max()) < 2.7
        assert len({float(image.sum()) for image in batch}) == 4
        assert torch.equal(batch, networks.crops(images, 4, 32, seed=3))

    def test_calibration_is_the_mean_over_batches(self) -> None:
        norm = nn.BatchNorm2d(3)
        network = nn.Sequential(norm, nn.Dropout(0.5)).eval()
        batches = [torch.randn(4, 3, 5, 5) + shift for shift in (0.0, 4.0)]
        networks.calibrate(network, batches)
        means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, means)
        assert norm.momentum == 0.1
        assert not any(module.training for module in network.modules())

    def test_the_most_telling_go_first(self) -> None:
        def names(*given: Any, **options: Any) -> list[str]:
            return [case.name for case in networks.planned_cases(*given, "fp32", **options)]

        telling = ["resnet50 n1 fp32", "mobilenet_v2 n8 fp32", "efficientnet_b0 n8 fp32"]
        assert names((), (), gpu=False, few=True) == telling
        assert names((), (), gpu=False)[:3] == telling
        assert names((), (), gpu=False)[-3:] == [
            "resnet50 n8 fp32",
            "mobilenet_v2 n1 fp32",
            "efficientnet_b0 n1 fp32",
        ]
        assert names((), (), gpu=True)[::8] == ["resnet50 n32 fp32", "resnet50 n1 fp32"]
        assert names(("densenet121",), (2, 4), gpu=False) == ["densenet121 n2 fp32", "densenet121 n4 fp32"]
        assert "no_such" in str(networks.Model("tiny", "", "no_such").why_not())


def test_commit_and_dirt(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    here = git_state(Path(__file__).parents[1])
    assert here is None or len(here["commit"]) == 40
