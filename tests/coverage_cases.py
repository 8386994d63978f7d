"""What `tests.coverage_report` runs under gcov: every branch of kernels and plan, on small problems.

``python -m tests.coverage_cases`` runs them in the library built for coverage; what each computes is compared
as in the tests, so that a line counts as reached only where its result is right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests import test_depthwise_kernel
from tests.layouts import channels_last, misaligned_channels_last, odd_unit_strides, sliced_channels_last
from tests.plans import plan_names
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    NORM_PARTS,
    Problem,
    Wanted,
    error_bound,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
)
from tests.shapes import SHAPES, TELLING_SHAPES, ConvShape, shape_named
from tests.simt import binding, conv_norm_act, list_plans
from tests.simt.conv import _geometry
from tests.test_depthwise_toeplitz_kernel import SHAPES as TOEPLITZ_SHAPES
from tests.test_depthwise_toeplitz_kernel import placed_value
from tests.test_depthwise_toeplitz_kernel import plans_of as toeplitz_plans
from tests.test_float32_kernels import KERNELS as FLOAT32
from tests.test_float32_kernels import TAILS
from tests.test_grouped_kernel import GROUPED, grouped_plans, spread
from tests.test_simt_implicit_gemm import LARGER, tensor_core_plans, without_split
from tests.test_small_m_kernel import FEW_PIXELS
from tests.test_small_m_kernel import plans_of as small_m_plans
from tests.test_stem_kernel import ALMOST_UNITS, CHUNKED, MANY_TILES, STEMS, stem_plans, strided_problem

BEYOND_INT = 2**31


def check(problem: Problem, **extra: object) -> None:
    result = problem.call(conv_norm_act, **extra)
    assert torch.equal(result, expected_rounded(problem)), (problem.x.shape, extra)


def dense(problem: Problem) -> Problem:
    return problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def every_shape() -> None:
    for shape in SHAPES:
        for dtype in DTYPES if shape in TELLING_SHAPES else DTYPES[1:2]:
            problem = integer_problem(shape, dtype, Wanted("relu", residual_order="act_add"))
            check(problem)
            check(dense(problem), allow_tf32=True)
            check(problem, plan="direct")


def every_instantiation() -> None:
    for dtype in DTYPES:
        shapes = LARGER if dtype == torch.float16 else (*LARGER[2:5], *LARGER[6:])
        for shape in shapes:
            problem = dense(integer_problem(shape, dtype, Wanted(residual_order="add_act")))
            for plan in {without_split(plan): plan for plan in tensor_core_plans(problem)}.values():
                check(problem, plan=plan, allow_tf32=True)
    for tile in ("64x64x32", "128x8x32", "256x1x16"):
        for order in (None, "add_act", "act_add"):
            problem = integer_problem(shape_named("groups_odd"), torch.float16, Wanted(residual_order=order))
            check(problem, plan=f"direct {tile}")


def every_plan_of_small_m() -> None:
    for dtype in DTYPES:
        for shape in FEW_PIXELS:
            check(integer_problem(shape, dtype, Wanted(residual_order="add_act")), plan="small_m")
            given = integer_problem(shape, dtype, Wanted(residual_order="act_add"))
            for problem in (given, dense(given)):
                for plan in small_m_plans(problem):
                    check(problem, plan=plan)
    many = torch.zeros((), dtype=torch.float16).expand(33, 8, 1, 1)
    list_plans(many, many[:8])
    list_plans(
        many[:1, :1].expand(1, BEYOND_INT - 2048, 1, 1), many[:1, :1].expand(1, BEYOND_INT - 2048, 1, 1)
    )


def every_depthwise() -> None:
    for dtype in DTYPES:
        for shape in test_depthwise_kernel.SHAPES:
            problem = dense(integer_problem(shape, dtype, Wanted(residual_order="add_act")))
            for plan in test_depthwise_kernel.depthwise_plans(problem):
                check(problem, plan=plan)
    shape = test_depthwise_kernel.FILTERS[0]
    for order in (None, "act_add"):
        problem = dense(integer_problem(shape, torch.float16, Wanted(residual_order=order)))
        check(problem, plan="depthwise")
        check(problem.replace(x=misaligned_channels_last(problem.x)), plan="depthwise")
    half = torch.zeros((), dtype=torch.float16)
    for one_way in ({"stride": (1, 2)}, {"dilation": (1, 2)}):
        list_plans(half.expand(8, 8, 9, 9), half.expand(8, 1, 3, 3), groups=8, **one_way)
    list_plans(half.expand(8, 8, 2, BEYOND_INT - 2000), half.expand(8, 1, 1, 1), stride=(1, 300), groups=8)
    list_plans(half.expand(1 << 26, 8, 28, 28), half.expand(8, 1, 1, 1), groups=8)


def every_epilogue() -> None:
    shape = ConvShape("eight_and_a_tail", 1, 8, 5, 5, 20, 1, 1, "whole vectors of channels and some left")
    for dtype in DTYPES:
        for plan in ("direct", "implicit_gemm_sm80 64x64x" + ("16" if dtype == torch.float32 else "32")):
            for order in (None, "add_act", "act_add"):
                check(
                    dense(integer_problem(shape, dtype, Wanted(residual_order=order))),
                    plan=plan,
                    allow_tf32=True,
                )
            for norm in NORM_PARTS:
                for bias in (False, True):
                    wanted = Wanted(norm=norm, bias=bias, norm_dtype=dtype)
                    check(integer_problem(shape, dtype, wanted), plan=plan, allow_tf32=True)
            for layout in (channels_last, misaligned_channels_last):
                problem = integer_problem(LARGER[2], dtype, Wanted(residual_order="add_act"))
                problem = dense(problem).replace(residual=layout(problem.residual))
                check(problem, plan=plan, allow_tf32=True)
    for act in ACTIVATIONS:
        problem = random_problem(shape, torch.float32, Wanted(act, ACTIVATIONS[act]))
        problem = problem.replace(x=problem.x * 12)
        error = relative_error(problem.call(conv_norm_act), expected_exactly(problem))
        assert error <= error_bound(torch.float32), act
        problem = dense(random_problem(LARGER[2], torch.float16, Wanted(act, ACTIVATIONS[act])))
        error = relative_error(
            problem.call(conv_norm_act, plan="implicit_gemm_sm80"), expected_exactly(problem)
        )
        assert error <= error_bound(torch.float16), act
    one = integer_problem(ConvShape("one", 1, 8, 5, 5, 1, 3, 3, "one output channel"), torch.float16)
    check(dense(one), plan="implicit_gemm_sm80")


def every_layout() -> None:
    for name in ("channels_mod_4", "one_filter", "one_row", "one_column", "all_ones", "groups_wide"):
        for layout in (channels_last, sliced_channels_last, misaligned_channels_last):
            problem = dense(integer_problem(shape_named(name), torch.float16))
            check(problem.replace(x=layout(problem.x)))
            check(problem.replace(weight=layout(problem.weight)))
            check(
                problem.replace(x=odd_unit_strides(problem.x, 7), weight=odd_unit_strides(problem.weight, 7))
            )
    for name in ("one_row", "one_column"):
        problem = dense(integer_problem(shape_named(name), torch.float16))
        check(problem.replace(x=odd_unit_strides(problem.x, 7)), plan="implicit_gemm_sm80")
    pointwise = dense(integer_problem(LARGER[2], torch.float16))
    check(pointwise.replace(x=sliced_channels_last(pointwise.x)))
    check(pointwise.replace(x=pointwise.x[:, :, ::2], padding=(0, 0)))
    check(pointwise.replace(x=pointwise.x[:, :, :, ::2]))
    check(pointwise.replace(padding=(1, 0)))
    check(pointwise.replace(padding=(0, 1)))
    check(pointwise.replace(stride=(1, 2)))


def every_float32_kernel() -> None:
    for shape in LARGER:
        problem = dense(integer_problem(shape, torch.float32, Wanted(residual_order="add_act")))
        for plan in {
            without_split(plan): plan for kernel in FLOAT32 for plan in plan_names(problem, kernel)
        }.values():
            check(problem, plan=plan)
    # sums that are not finite: of rows and channels that the output lacks too, over padding, through splits
    for shape, at in ((TAILS, (0, 3, 2, 2)), (LARGER[1], (0, 150, 3, 3)), (LARGER[7], (0, 33, 7, 6))):
        problem = dense(integer_problem(shape, torch.float32, Wanted(norm="none")))
        for operand, place in (("x", at), ("weight", (7, 3, 0, 0))):
            given = getattr(problem, operand).clone()
            given[place] = float("inf")
            infinite = problem.replace(**{operand: given})
            expected = infinite.call(conv_norm_act, plan="direct").isfinite()
            for plan in plan_names(infinite, FLOAT32[1]):
                result = infinite.call(conv_norm_act, plan=plan)
                assert torch.equal(result.isfinite(), expected), plan


def every_strip_tile() -> None:
    for shape in TOEPLITZ_SHAPES:
        for dtype in (torch.float16, torch.bfloat16):
            problem = integer_problem(shape, dtype, Wanted(residual_order="act_add"))
            check(problem, plan="depthwise_toeplitz")
            for plan in toeplitz_plans(dense(problem)):
                check(dense(problem), plan=plan)
            problem = placed_value(shape, dtype, float("inf"), (0, 0))
            result = problem.call(conv_norm_act, plan="depthwise_toeplitz")
            assert torch.equal(result.isfinite(), expected_exactly(problem).isfinite())
    half = torch.zeros((), dtype=torch.float16)
    for channels, filters, width in ((8, 16, 3), (8, 8, 11), (8, 8, 1), (9, 9, 3)):
        list_plans(
            half.expand(1, channels, 9, 12),
            half.expand(filters, 1, 3, width),
            padding=(1, 5),
            groups=channels,
        )
    for pair in ((1, 2), (2, 1)):
        list_plans(half.expand(1, 8, 9, 9), half.expand(8, 1, 3, 3), groups=8, dilation=pair)
        list_plans(half.expand(1, 8, 9, 9), half.expand(8, 1, 3, 3), groups=8, stride=pair)
    for height in (120, 399):
        list_plans(half.expand(1, 8, 400, 9), half.expand(8, 1, height, 3), groups=8)
    list_plans(half.expand(2**31, 8, 1, 1), half.expand(8, 1, 3, 3), groups=8, padding=(1, 1))
    list_plans(half.expand(2**30, 256, 1, 1), half.expand(256, 1, 3, 3), groups=256, padding=(1, 1))


def every_share_of_grouped() -> None:
    for shape in GROUPED:
        for dtype in DTYPES:
            problem = dense(integer_problem(shape, dtype, Wanted(residual_order="add_act")))
            check(problem.replace(weight=spread(problem.weight)), plan="grouped", allow_tf32=True)
            for plan in grouped_plans(problem)[:: 1 if shape.name in ("of_16", "of_32_to_44") else 5]:
                check(problem, plan=plan, allow_tf32=True)
    for shape in (GROUPED[0], GROUPED[1], GROUPED[9]):
        problem = integer_problem(shape, torch.float16, Wanted(residual_order="add_act"))
        check(problem, plan="grouped")
        check(integer_problem(shape, torch.float16), plan="grouped")
        for layout in (sliced_channels_last, misaligned_channels_last):
            check(dense(problem).replace(x=layout(problem.x)), plan="grouped")
            check(dense(problem).replace(weight=layout(problem.weight)), plan="grouped")
    half = torch.zeros((), dtype=torch.float16)
    list_plans(half.expand(1 << 30, 32, 1, 1), half.expand(32, 8, 1, 1), groups=4)
    list_plans(half.expand(1, 512, 40, 40), half.expand(512, 256, 31, 31), groups=2)
    list_plans(half.expand(1, 0, 4, 4), half.expand(8, 0, 1, 1), groups=2)


def every_stem() -> None:
    for dtype in DTYPES:
        for shape in STEMS:
            plain = integer_problem(shape, dtype, Wanted(residual_order="add_act"))
            for problem in (plain, dense(plain), plain.replace(x=misaligned_channels_last(plain.x))):
                check(problem, plan="stem", allow_tf32=True)
        for shape in STEMS[:3]:
            problem = integer_problem(shape, dtype)
            for plan in stem_plans(problem):
                check(problem, plan=plan, allow_tf32=True)
    for name in ALMOST_UNITS:
        check(strided_problem(name, torch.float16), plan="stem")
    for shape in (*CHUNKED, MANY_TILES):
        check(integer_problem(shape, torch.float16), plan="stem", device="L4")
    many_tiles = integer_problem(MANY_TILES, torch.float16)
    check(many_tiles, plan="stem 64x32x16", device="L4")
    half = torch.zeros((), dtype=torch.float16)
    list_plans(half.float().expand(1, 3, 8, 8), half.float().expand(8, 3, 3, 3))
    list_plans(half.expand(0, 3, 8, 8), half.expand(8, 3, 3, 3))
    list_plans(half.expand(1, 3, 8, 3000), half.expand(8, 3, 1, 2500))
    list_plans(half.expand(1, 3, 1 << 30, 4), half.expand(8, 3, 3, 3), padding=(1, 1))
    list_plans(half.expand(1 << 10, 3, 1 << 11, 1 << 11), half.expand(8, 3, 1, 1))


def every_answer_of_the_plan() -> None:
    half = torch.zeros((), dtype=torch.float16)
    weight = half.expand(8, 8, 1, 1)
    list_plans(half.expand(1, 2080, 2, 2), half.expand(8, 2080, 1, 1))
    list_plans(half.expand(32, 64, 56, 56), half.expand(64, 64, 1, 1))
    list_plans(half.expand(32, 64, 56, 56), half.expand(64, 64, 3, 3), padding=(1, 1))
    list_plans(half.expand(1, 0, 2, 2), half.expand(8, 0, 1, 1))
    list_plans(channels_last(torch.zeros(1, 64, 9, 9)), channels_last(torch.zeros(64, 64, 1, 1)))
    list_plans(half.expand(8, 64, 9, 9), half.expand(64, 64, 1, 1), device="L4")
    list_plans(half.expand(1, 8, 2, 40), half.expand(8, 8, 1, 33))
    refused(lambda: list_plans(half.expand(1, 8, BEYOND_INT, 1), weight), "padded input height")
    refused(lambda: list_plans(half.expand(1, 8, 2, 2), weight, stride=(1, BEYOND_INT)), "the stride is")
    refused(lambda: list_plans(half.expand(1, 8, 2, 2), weight, dilation=(BEYOND_INT, 1)), "the dilation is")
    refused(lambda: list_plans(half.expand(1 << 20, 8, 1 << 15, 1 << 15), weight), "split the batch")
    problem = integer_problem(shape_named("odd_channels"), torch.float16)
    refused(lambda: problem.call(conv_norm_act, plan="direct 1x2x3"), "no plan")
    refused(lambda: problem.call(conv_norm_act, plan="direct 64x64x3"), "no plan")
    refused(lambda: problem.call(conv_norm_act, plan="implicit_gemm_sm80 64x64x32"), "legal are")
    refused(lambda: problem.call(conv_norm_act, plan="cudnn"), "only the operator")
    problem = integer_problem(shape_named("empty_batch"), torch.float16)
    geometry = _geometry(problem.x, problem.weight, (1, 1), (1, 1), (1, 1), 1, "H100", False)
    binding.run_conv(binding.ConvCall(act=b"relu", residual_order=b"add_act", **geometry))


def main() -> None:
    torch.set_num_threads(1)
    binding.CONV = "conv_coverage"
    every_answer_of_the_plan()
    every_share_of_grouped()
    every_layout()
    every_epilogue()
    every_shape()
    every_instantiation()
    every_plan_of_small_m()
    every_strip_tile()
    every_float32_kernel()
    every_depthwise()
    every_stem()


if __name__ == "__main__":
    main()
