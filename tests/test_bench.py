"""The bench: its arithmetic, its choices and its files. Nothing here asserts a time."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bench.checks import relative_error
from bench.layer_list import ROLES, SUITES, Layer, Role, layers_of, parse, read_rows, select
from bench.layer_result import BASELINE
from bench.roofline import Ceilings, Floor, floor, flops, least_bytes, measure_ceilings, share
from bench.routes import (
    ROUTES,
    CudnnAddRelu,
    CudnnRelu,
    Folded,
    Fused,
    ThreeStep,
    folded_weight_and_bias,
    make_case,
    reference,
)
from bench.setting import Budget, Effort, Setting
from bench.stats import Summary, geometric_mean, paired_ratio, summarize, verdict
from bench.timing import EventStopwatch, RandomPool, Work, captured, input_sets_needed, interleaved, rotating

CPU = torch.device("cpu")
FORMATS = (torch.contiguous_format, torch.channels_last)
ROW = {
    "kind": "kxk dense",
    "norm": "BatchNorm2d",
    "act": "ReLU",
    "residual": "none",
    "conv_bias": "0",
    **dict.fromkeys(
        ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups", "uses", "models"), "1"
    ),
    "cin": "8",
    "cout": "4",
    "kh": "3",
    "kw": "3",
    "h": "6",
    "w": "5",
}
CEILINGS = Ceilings(1e9, 1e12, 1, 1, "float32")


def layer(**changes: object) -> Layer:
    return replace(parse(ROW, "a role"), **changes)  # type: ignore[arg-type]


def setting(budget: Budget | None = None, batch: int | None = 2) -> Setting:
    return Setting(CPU, torch.float32, "quick", batch, Effort(3, 0.0), budget or Budget(None), seed=0)


def exact(value: float) -> Summary:
    return Summary(value, value, value, 1)


class FakeClock:
    """Seconds that pass only where work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now
        work()
        return self.now - start


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


class TestLayerList:
    def test_every_role_has_a_row_and_every_name_is_its_own(self) -> None:
        chosen = layers_of("default")
        assert [one.role for one in chosen] == [role.name for role in ROLES]
        assert len({one.name for one in chosen}) == len(chosen)
        assert all(one.models >= 2 for one in chosen)

    def test_quick_is_the_beginning_of_default(self) -> None:
        quick = layers_of("quick")
        assert 0 < len(quick) < len(layers_of("default"))
        assert quick == layers_of("default")[: len(quick)]

    def test_kinds_that_must_be_there(self) -> None:
        chosen = layers_of("default")
        assert {one.kh for one in chosen if one.depthwise} == {3, 5, 7}
        assert any(1 < one.groups < one.cin for one in chosen)
        assert any(one.dil_h > 1 for one in chosen)
        assert any(one.cin == 3 for one in chosen)
        assert any((one.h, one.w) == (1, 1) for one in chosen)
        assert {one.residual_order for one in chosen} == {None, "add_act", "act_add"}

    def test_most_used_row_of_at_least_two_networks_is_chosen(self) -> None:
        rows = [
            ROW | {"uses": "9", "models": "1", "cin": "1"},
            ROW | {"uses": "5", "models": "2", "cin": "2"},
            ROW | {"uses": "7", "models": "2", "cin": "3"},
            ROW | {"uses": "8", "models": "2", "cin": "4", "kh": "5"},
        ]
        assert select(Role("r", {"kh": "3"}), rows).cin == 3
        with pytest.raises(LookupError, match=r"no row .* matches the role 'r'"):
            select(Role("r", {"kh": "11"}), rows)

    def test_rows_are_complete(self) -> None:
        assert len(read_rows()) > 3000
        assert set(ROW) == set(read_rows()[0])

    def test_unknown_suite_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=", ".join(SUITES)):
            layers_of("everything")

    def test_names(self) -> None:
        assert layer(cin=4).name == "3x3 4 @6 BN ReLU"
        assert layer(groups=8, cout=8, stride_h=2, stride_w=2).name == "dw 3x3 s2 8 @6 BN ReLU"
        assert layer(groups=2, dil_h=2, residual="add_act").name == "3x3 d2 g2 8->4 @6 BN add ReLU"
        assert (
            layer(norm="none", conv_bias=True, act="none", residual="act_add").name == "3x3 8->4 @6 bias add"
        )

    @pytest.mark.parametrize("one", layers_of("default"), ids=lambda one: one.name)
    def test_output_size_is_the_one_torch_computes(self, one: Layer) -> None:
        conv = nn.Conv2d(
            one.cin,
            one.cout,
            (one.kh, one.kw),
            (one.stride_h, one.stride_w),
            (one.pad_h, one.pad_w),
            (one.dil_h, one.dil_w),
            one.groups,
            device="meta",
        )
        assert conv(torch.empty(1, one.cin, one.h, one.w, device="meta")).shape[2:] == (one.out_h, one.out_w)


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
        measured = measure_ceilings(CPU, torch.float32, seed=0, small=True)
        assert measured.bytes_per_second > 0
        assert measured.flops_per_second > 0
        assert measured.matrix_precision == "float32"
        assert torch.backends.cuda.matmul.fp32_precision == "none"


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

    def test_inputs_rotate(self) -> None:
        seen: list[float] = []

        def call(x: Tensor) -> Tensor:
            seen.append(float(x))
            return x

        work = rotating(call, [(torch.tensor(1.0),), (torch.tensor(2.0),), (torch.tensor(3.0),)])
        for _ in range(4):
            work.run()
        assert seen == [1.0, 2.0, 3.0, 1.0]

    def test_input_sets_outrun_the_cache_three_times(self) -> None:
        assert input_sets_needed(100, 1000) == 30
        assert input_sets_needed(10**9, 1000) == 2
        assert input_sets_needed(1, 10**9) == 512

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

    def test_a_graph_holds_one_call_per_input_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []

        class Stream:
            def wait_stream(self, other: "Stream") -> None:
                log.append("wait")

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        @contextmanager
        def entered(what: object) -> Iterator[None]:
            log.append("capture" if isinstance(what, Graph) else "side")
            yield
            log.append("end")

        for name, fake in (("Stream", Stream), ("CUDAGraph", Graph), ("stream", entered), ("graph", entered)):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))

        def call(x: Tensor) -> Tensor:
            log.append(str(int(x)))
            return x + 1

        graph = captured(call, [(torch.tensor(index),) for index in range(3)])
        warmup = ["wait", "side", "0", "0", "0", "end", "wait", "synchronize"]
        assert log == [*warmup, "capture", "0", "1", "2", "end"]
        assert int(graph.first_output) == 1
        assert graph.work.calls == 3
        graph.work.run()
        assert log[-1] == "replay"

    def test_budget(self) -> None:
        clock = FakeClock()
        budget = Budget(10.0, clock=lambda: clock.now)
        clock.spend(6.0)
        assert budget.allows()
        assert not budget.allows(keep=5.0)
        clock.spend(4.0)
        assert not budget.allows()
        assert Budget(None).allows(keep=1e9)


VARIANTS = {
    "norm": {},
    "bias and norm": {"conv_bias": True},
    "no norm": {"norm": "none", "conv_bias": True, "act": "SiLU"},
    "bare": {"norm": "none", "act": "none"},
    "add_act": {"residual": "add_act"},
    "act_add": {"residual": "act_add", "act": "SiLU"},
    "depthwise": {"groups": 8, "cout": 8, "act": "ReLU6"},
    "strided": {"stride_h": 2, "stride_w": 2, "act": "Hardswish"},
    "gelu": {"norm": "none", "act": "GELU"},
    "layer norm follows": {"norm": "other", "act": "none", "conv_bias": True},
}


class TestRoutes:
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
    @pytest.mark.parametrize("route", [Fused(), ThreeStep(), Folded()], ids=lambda route: route.name)
    def test_every_route_computes_the_layer(
        self, route: object, changes: dict[str, object], memory_format: torch.memory_format
    ) -> None:
        assert isinstance(route, (Fused, ThreeStep, Folded))
        case = make_case(layer(**changes), CPU, torch.float32, seed=1)
        shapes = [(2, case.layer.cin, case.layer.h, case.layer.w)]
        if case.layer.residual_order:
            shapes.append((2, case.layer.cout, case.layer.out_h, case.layer.out_w))
        (inputs,) = RandomPool(CPU, torch.float32, seed=2).input_sets(shapes, 1, memory_format)
        kept = [tensor.clone() for tensor in inputs]
        with torch.inference_mode():
            output = route.prepare(case, memory_format)(*inputs)
            assert relative_error(output, reference(case, *inputs)) < 1e-6
        assert all(torch.equal(tensor, before) for tensor, before in zip(inputs, kept, strict=True))

    def test_reference_is_the_formula(self) -> None:
        case = make_case(layer(conv_bias=True, residual="add_act"), CPU, torch.float32, seed=1)
        x, residual = torch.randn(2, 8, 6, 5), torch.randn(2, 4, 6, 5)
        assert case.norm is not None
        z = case.norm.double()(case.conv.double()(x.double())) + residual.double()
        torch.testing.assert_close(reference(case, x, residual), z.clamp(min=0), rtol=1e-12, atol=1e-12)

    def test_folding_happens_in_float64(self) -> None:
        case = make_case(layer(conv_bias=True), CPU, torch.float64, seed=1)
        weight, bias = folded_weight_and_bias(case)
        assert case.norm is not None
        x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
        folded = nn.functional.conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(folded, case.norm(case.conv(x)), rtol=1e-12, atol=1e-12)
        half = make_case(layer(conv_bias=True), CPU, torch.float16, seed=1)
        assert folded_weight_and_bias(half)[0].dtype == torch.float16

    def test_routes_say_why_they_do_not_apply(self) -> None:
        gpu = torch.device("cuda")
        relu, add_relu = CudnnRelu(), CudnnAddRelu()
        assert "needs a CUDA device" in str(relu.why_not(layer(), CPU))
        assert relu.why_not(layer(), gpu) is None
        assert "only ReLU, the layer has SiLU" in str(relu.why_not(layer(act="SiLU"), gpu))
        assert "residual" in str(relu.why_not(layer(residual="add_act"), gpu))
        assert add_relu.why_not(layer(residual="add_act"), gpu) is None
        assert "before the activation" in str(add_relu.why_not(layer(residual="act_add"), gpu))
        assert "before the activation" in str(add_relu.why_not(layer(), gpu))
        assert "no norm to fold" in str(Folded().why_not(layer(norm="none"), gpu))
        assert Folded().why_not(layer(), gpu) is None

    @pytest.mark.parametrize(("route", "residual"), [(CudnnRelu(), "none"), (CudnnAddRelu(), "add_act")])
    def test_cudnn_is_called_as_its_schema_says(
        self, route: CudnnRelu, residual: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "cudnn_convolution_relu" if residual == "none" else "cudnn_convolution_add_relu"
        schema = getattr(torch.ops.aten, name).default._schema
        seen: dict[str, object] = {}

        def record(*arguments: object) -> Tensor:
            seen.update(zip((argument.name for argument in schema.arguments), arguments, strict=True))
            return torch.zeros(1)

        monkeypatch.setattr(torch, name, record)
        case = make_case(layer(residual=residual, stride_h=2, dil_w=3, groups=2), CPU, torch.float32, seed=0)
        x, z = torch.zeros(1), torch.ones(1)
        route.prepare(case, torch.channels_last)(*((x, z) if residual == "add_act" else (x,)))
        assert seen["self"] is x
        assert (seen["stride"], seen["padding"], seen["dilation"], seen["groups"]) == (
            (2, 1),
            (1, 1),
            (1, 3),
            2,
        )
        assert torch.equal(seen["weight"], folded_weight_and_bias(case)[0])  # type: ignore[arg-type]
        assert seen["weight"].is_contiguous(memory_format=torch.channels_last)  # type: ignore[attr-defined]
        assert torch.equal(seen["bias"], folded_weight_and_bias(case)[1])  # type: ignore[arg-type]
        if residual == "add_act":
            assert seen["z"] is z
            assert seen["alpha"] == 1.0

    def test_exactly_one_route_is_ours(self) -> None:
        assert [route.name for route in ROUTES if route.ours] == ["fused"]
        assert BASELINE in [route.name for route in ROUTES]
