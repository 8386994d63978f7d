"""What tuning records of a model: every convolution that reaches the operator, as a kernel would get it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fused_cna
from fused_cna import ConvNormAct, _extension, ops
from fused_cna._recording import RecordedCall, record
from fused_cna.plan import _module_question, planner
from tests.layouts import LAYOUTS, Layout, channels_last
from tests.reference import DTYPES, Problem, Wanted, integer_problem, random_problem
from tests.shapes import SHAPES, shape_named


class Network(nn.Module):
    """Two equal blocks, one of which is used twice, one with a residual, and a call of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 16, 3, stride=2)
        self.a = ConvNormAct(16, 16, 3, act=nn.SiLU)
        self.b = ConvNormAct(16, 16, 3, act=nn.SiLU)
        self.head = nn.Parameter(torch.randn(8, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(self.a(self.stem(x))))
        return fused_cna.conv_norm_act(self.a(x, x), self.head)


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval().to(memory_format=torch.channels_last)


def image(*size: int) -> Tensor:
    return channels_last(torch.randn(*(size or (2, 3, 16, 16))))


def recorded(problem: Problem) -> RecordedCall:
    """A call of the operator as tuning sees it."""
    (call,) = record(lambda: ops.operator(*problem.operator_arguments()), (), planner())
    return call


def test_every_distinct_convolution_is_recorded_once() -> None:
    stem, block, with_residual, head = record(network(), image(), planner())
    assert (stem.uses, stem.names) == (1, ["stem"])
    assert (block.uses, block.names) == (3, ["a", "b"])
    assert (with_residual.uses, with_residual.names) == (1, ["a"])
    assert (head.uses, head.names) == (1, ["head"])
    assert str(stem) == "3x3 stride 2, 3 to 16 channels, 2 x 16 x 16, tf32, norm + relu"
    assert str(with_residual) == "3x3, 16 to 16 channels, 2 x 8 x 8, tf32, norm + residual + silu"
    assert str(head) == "1x1, 16 to 8 channels, 2 x 8 x 8, tf32"
    assert block.problem["x_access"] == 16
    assert stem.problem["x_access"] == 4
    assert torch.equal(block.arguments[1], network().a.conv.weight)


def test_a_call_into_memory_of_the_callers_is_recorded() -> None:
    problem = random_problem(shape_named("3x3"), torch.float16)
    by_value = recorded(problem)
    shape = by_value.arguments[0].shape
    out = torch.empty(shape[0], problem.weight.shape[0], *shape[2:], dtype=torch.float16)
    (call,) = record(lambda: ops.out_operator(*problem.operator_arguments(), out), (), planner())
    assert call.key == by_value.key
    assert len(call.arguments) == len(by_value.arguments)


def test_recording_changes_neither_results_nor_what_comes_after() -> None:
    model, x = network(), image()
    results: list[Tensor] = []
    record(lambda: results.append(model(x)), (), planner())
    assert not ops.operator_everywhere
    with torch.inference_mode():
        assert torch.equal(results[0], model(x))
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, (), planner())
    assert not ops.operator_everywhere


def test_inputs_come_in_any_form() -> None:
    block, x = ConvNormAct(4, 4).eval(), image(1, 4, 8, 8)
    keys = {
        record(block, inputs, planner())[0].key
        for inputs in (x, (x,), [x], {"x": x}, (x, None), {"x": x, "residual": None})
    }
    assert len(keys) == 1
    (with_residual,) = record(block, (x, x), planner())
    assert with_residual.problem["has_residual"]


def test_autocast_is_seen_as_the_kernel_would_see_it() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        calls = record(network(), image(), planner())
    assert {call.problem["dtype"] for call in calls} == {"bfloat16"}
    assert {call.arguments[0].dtype for call in calls} == {torch.bfloat16}


def test_a_compiled_model_is_recorded_too() -> None:
    model = network()
    eager = [call.key for call in record(model, image(), planner())]
    compiled, x = torch.compile(model, backend="eager"), image()
    assert [call.key for call in record(compiled, x, planner())] == eager
    with torch.inference_mode():
        before = compiled(x)
        assert [call.key for call in record(compiled, x, planner())] == eager
        assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity, nn.Softsign], ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, None, nn.InstanceNorm2d], ids=["batch norm", "none", "another norm"]
)
def test_a_module_is_explained_as_it_is_recorded(
    norm: type[nn.Module] | None, act: type[nn.Module], residual_order: str, with_residual: bool
) -> None:
    for options in ({}, {"padding": "same"}, {"padding_mode": "reflect"}, {"groups": 2, "dilation": 2}):
        block = ConvNormAct(4, 4, 3, norm=norm, act=act, residual_order=residual_order, **options).eval()
        x = image(2, 4, 8, 8)
        (call,) = record(block, (x, x) if with_residual else x, planner())
        question = _module_question(block, x, x if with_residual else None)
        assert planner().problem(question) == call.problem


def test_meta_tensors_will_do() -> None:
    with torch.device("meta"):
        model, x = Network().eval(), torch.empty(2, 3, 16, 16)
    assert len(record(model, x, planner())) == 4


def test_what_no_kernel_takes_is_left_out() -> None:
    block = ConvNormAct(4, 4).eval()

    def mixed() -> None:
        block(torch.randn(1, 4, 8, 8))
        block(torch.randn(0, 4, 8, 8))
        ConvNormAct(4, 4).eval().double()(torch.randn(1, 4, 8, 8).double())

    assert len(record(mixed, (), planner())) == 1


needs_extension = pytest.mark.skipif(
    not _extension.is_available(), reason=f"needs the extension: {_extension.unavailable_reason()}"
)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_recorded_problem_is_the_one_that_the_kernel_plans_for(layout: Layout, dtype: torch.dtype) -> None:
    for name, wanted in (
        ("3x3", Wanted("relu", norm="none")),
        ("odd_channels", Wanted("silu", residual_order="act_add")),
        ("padding_asymmetric", Wanted("identity", residual_order="add_act")),
        ("1x1", Wanted("relu", residual_order="add_act")),
    ):
        problem = random_problem(shape_named(name), dtype, wanted)
        problem = problem.replace(x=layout(problem.x), weight=layout(problem.weight))
        call = recorded(problem)
        compiled = torch.ops.fused_cna._problem(*problem.operator_arguments()).tolist()
        numbered = dict(call.problem) | {"dtype": list(DTYPES).index(dtype)}
        assert compiled == [int(value) for value in numbered.values()]


@needs_extension
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_recorded_problem_follows_the_switch_of_torch(precision: str) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = precision
        problem = random_problem(shape_named("3x3"), torch.float32)
        fields = torch.ops.fused_cna._problem(*problem.operator_arguments()).tolist()
        call = recorded(problem)
        assert call.problem["allow_tf32"] == (precision == "tf32")
        assert fields[list(call.problem).index("allow_tf32")] == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_every_shape_of_the_tests_can_be_recorded() -> None:
    for shape in SHAPES:
        problem = integer_problem(shape, torch.float16)
        if math.prod(shape.output_size) == 0:
            continue
        assert recorded(problem).problem["k"] == shape.k
