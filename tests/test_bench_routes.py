"""The ways to run a layer that are compared, their answers, and the comparison."""

import pytest
import torch
from torch import Tensor, nn

from bench.entry import judge
from bench.layer_result import BASELINE, compare
from bench.roofline import Floor
from bench.routes import (
    ROUTES,
    Cudnn,
    Folded,
    Fused,
    ThreeStep,
    folded_weight_and_bias,
    make_case,
    memory_formats,
    reference,
)
from bench.setting import PRECISIONS
from bench.timing import RandomPool
from fused_cna._accuracy import relative_error
from tests.bench_cases import CPU, FORMATS, entry, layer
from tests.reference import library_bound

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
            output = route.prepare(case.laid_out(memory_format))(*inputs)
            expected = reference(case, *inputs)
            eager = ThreeStep().prepare(case.laid_out(memory_format))(*inputs)
            allowed = library_bound(torch.float32, relative_error(eager, expected))
            assert relative_error(output, expected) <= allowed
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
        assert "needs a CUDA device" in str(Cudnn().why_not(layer(), CPU))
        assert "only ReLU, the layer has SiLU" in str(Cudnn().why_not(layer(act="SiLU"), gpu))
        assert [Cudnn().why_not(layer(residual=order), gpu) for order in ("none", "add_act", "act_add")] == [
            None,
            None,
            "adds a residual only before the activation",
        ]
        assert "no norm to fold" in str(Folded().why_not(layer(norm="none"), gpu))
        assert Folded().why_not(layer(), gpu) is None

    @pytest.mark.parametrize("residual", ["none", "add_act"])
    def test_cudnn_is_called_as_its_schema_says(self, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "cudnn_convolution_relu" if residual == "none" else "cudnn_convolution_add_relu"
        schema = getattr(torch.ops.aten, name).default._schema
        seen: dict[str, object] = {}

        def record(*arguments: object) -> Tensor:
            seen.update(zip((argument.name for argument in schema.arguments), arguments, strict=True))
            return torch.zeros(1)

        monkeypatch.setattr(torch, name, record)
        case = make_case(layer(residual=residual, stride_h=2, dil_w=3, groups=2), CPU, torch.float32, seed=0)
        x, z = torch.zeros(1), torch.ones(1)
        Cudnn().prepare(case.laid_out(torch.channels_last))(*((x, z) if residual == "add_act" else (x,)))
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

    @pytest.mark.parametrize(
        ("changes", "precision", "formats"),
        [
            ({"cin": 64, "cout": 64}, "fp16", 1),
            ({"cin": 64, "cout": 64}, "tf32", 1),
            ({"cin": 64, "cout": 64}, "fp32", 2),
            ({"cin": 64, "cout": 64, "groups": 64}, "fp16", 2),
            ({"cin": 3, "cout": 64}, "fp16", 2),
        ],
    )
    def test_a_gpu_tries_nchw_where_it_may_be_faster(
        self, changes: dict[str, int], precision: str, formats: int
    ) -> None:
        tried = memory_formats(layer(**changes), PRECISIONS[precision], torch.device("cuda"))
        assert tried == (torch.channels_last, torch.contiguous_format)[:formats]
        assert len(memory_formats(layer(**changes), PRECISIONS[precision], CPU)) == 2

    def test_exactly_one_route_is_ours(self) -> None:
        assert [route.name for route in ROUTES if route.ours] == ["fused"]
        assert BASELINE in [route.name for route in ROUTES]


class TestComparison:
    def test_best_rival_counts_and_wrong_ones_do_not(self) -> None:
        entries = [
            entry("fused", 2.0, ours=True),
            entry(BASELINE, 6.0),
            entry("slow", 8.0),
            entry("wrong", 1.0, error=0.5),
        ]
        assert judge(entries, PRECISIONS["fp32"], (BASELINE,)) is None
        assert "wrong result" in str(entries[3].refused)
        comparison = compare(entries, Floor(1.0, "memory"))["launched"]
        assert comparison.rival == BASELINE
        assert comparison.speedup.median == 3.0
        assert comparison.verdict == "faster"
        assert comparison.roofline_share == 0.5

    @pytest.mark.parametrize("error", [1e-5, float("inf")])
    def test_a_wrong_fused_result_is_a_failure_and_not_compared(self, error: float) -> None:
        entries = [entry("fused", 2.0, ours=True, error=error), entry(BASELINE, 6.0)]
        assert "fused (channels_last): wrong result" in str(judge(entries, PRECISIONS["fp32"], (BASELINE,)))
        assert compare(entries, Floor(1.0, "memory")) == {}

    def test_baseline_is_compared_beside_the_best(self) -> None:
        entries = [entry("fused", 2.0, ours=True), entry(BASELINE, 6.0), entry("folded conv", 3.0)]
        assert compare(entries, Floor(1.0, "memory"))["launched"].rival == "folded conv"
        against = compare(entries, Floor(1.0, "memory"), BASELINE)["launched"]
        assert (against.rival, against.speedup.median) == (BASELINE, 3.0)
