"""Convolutions that nobody would write down: sizes and options drawn by hypothesis."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from tests.conformance import Subject
from tests.conftest import Backend
from tests.families import BY_NAME
from tests.layouts import LAYOUTS
from tests.plain import pair
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    EXACT_ACTIVATIONS,
    NORM_PARTS,
    Wanted,
    expected_exactly,
    integer_problem,
    random_problem,
    relative_error,
)
from tests.shapes import ConvShape, shape_named

pairs_to_3 = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def conv_shapes(draw: st.DrawFn) -> ConvShape:
    """Any convolution with a non-empty output, in any of its usual and unusual regimes."""
    groups = draw(st.integers(1, 4))
    per_group, filters_per_group = (
        draw(st.integers(1, 11)),
        draw(st.sampled_from((1, 2, 3, 5, 8, 16, 23, 67))),
    )
    r, s = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(pairs_to_3)
    pads = draw(st.one_of(st.tuples(*[st.integers(0, 5)] * 2), st.tuples(*[st.integers(0, 5)] * 4)))
    top, bottom, left, right = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    least_h = max(1, dilation[0] * (r - 1) + 1 - top - bottom)
    least_w = max(1, dilation[1] * (s - 1) + 1 - left - right)
    return ConvShape(
        "drawn",
        draw(st.integers(0, 3)),
        groups * per_group,
        least_h + draw(st.integers(0, 9)),
        least_w + draw(st.integers(0, 9)),
        groups * filters_per_group,
        r,
        s,
        "drawn by hypothesis",
        draw(pairs_to_3),
        pads,
        dilation,
        groups,
    )


@st.composite
def exact_options(draw: st.DrawFn) -> Wanted:
    act, act_params = draw(st.sampled_from(EXACT_ACTIVATIONS))
    return Wanted(
        act,
        act_params,
        draw(st.sampled_from(list(NORM_PARTS))),
        draw(st.booleans()),
        torch.float32,
        draw(st.sampled_from((None, "add_act", "act_add"))),
        draw(st.integers(0, 2**20)),
    )


layouts = st.sampled_from(LAYOUTS)


@settings(max_examples=150)
@given(conv_shapes(), st.sampled_from(DTYPES), exact_options(), layouts, layouts, layouts)
@example(shape_named("empty_batch"), torch.float16, Wanted(), LAYOUTS[0], LAYOUTS[1], LAYOUTS[0])
def test_kernels_are_exact_on_integers(
    kernels: Backend,
    shape: ConvShape,
    dtype: torch.dtype,
    wanted: Wanted,
    x_layout: object,
    weight_layout: object,
    residual_layout: object,
) -> None:
    problem = kernels.place(integer_problem(shape, dtype, wanted))
    residual = None if problem.residual is None else residual_layout(problem.residual)
    problem = problem.replace(x=x_layout(problem.x), weight=weight_layout(problem.weight), residual=residual)
    Subject(kernels, BY_NAME["chosen"]).check(problem, [""])


@settings(max_examples=100)
@given(conv_shapes(), st.sampled_from(list(ACTIVATIONS)), exact_options())
def test_the_operator_follows_the_formula_in_float64(shape: ConvShape, act: str, wanted: Wanted) -> None:
    drawn = Wanted(
        act, ACTIVATIONS[act], wanted.norm, wanted.bias, torch.float64, wanted.residual_order, wanted.seed
    )
    problem = random_problem(shape, torch.float64, drawn)
    expected = expected_exactly(problem)
    operator = torch.ops.fused_cna.conv_norm_act
    for actual in (operator(*problem.operator_arguments()), problem.call(fused_cna.conv_norm_act)):
        assert relative_error(actual, expected) < 1e-13


@settings(max_examples=100)
@given(conv_shapes(), layouts, layouts)
def test_fake_tensors_promise_what_conv2d_gives(
    shape: ConvShape, x_layout: object, weight_layout: object
) -> None:
    problem = integer_problem(shape, torch.float32)
    problem = problem.replace(x=x_layout(problem.x), weight=weight_layout(problem.weight))
    with FakeTensorMode() as mode:
        fake = torch.ops.fused_cna.conv_norm_act(*problem.map(mode.from_tensor).operator_arguments())
    real = torch.ops.fused_cna.conv_norm_act(*problem.operator_arguments())
    assert fake.shape == real.shape == shape.output_size
    assert fake.stride() == real.stride()
    if len(shape.padding) == 2 and shape.n > 0:
        expected = torch.conv2d(problem.x, problem.weight, **shape.options())
        assert fake.stride() == expected.stride()


@settings(max_examples=60)
@given(conv_shapes(), st.booleans(), st.sampled_from((nn.ReLU, nn.SiLU, nn.Softplus, None)), st.booleans())
def test_the_module_is_the_plain_one(
    shape: ConvShape, bias: bool, act: type[nn.Module] | None, norm: bool
) -> None:
    top, _, left, _ = shape.pads
    options = {
        "stride": shape.stride,
        "padding": (top, left),
        "dilation": shape.dilation,
        "groups": shape.groups,
    }
    fused, plain = pair(
        shape.c,
        shape.k,
        (shape.r, shape.s),
        bias=bias,
        act=act,
        norm=nn.BatchNorm2d if norm else None,
        **options,
    )
    x = torch.randn(shape.x_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        try:
            expected: Tensor = plain(x)
        except RuntimeError as refusal:
            with pytest.raises(RuntimeError, match=re.escape(str(refusal))):
                fused(x)
        else:
            torch.testing.assert_close(fused(x), expected)
