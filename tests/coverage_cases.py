"""What `tests.coverage_report` runs under gcov: every branch of kernels and plan, on small problems.

``python -m tests.coverage_cases`` runs them in the library built for coverage; what each computes is compared
as in the tests, so that a line counts as reached only where its result is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle, product

import pytest
import torch

from tests.conformance import Subject, without_zeros
from tests.conftest import Simulator
from tests.families import BY_NAME, FAMILIES, HALVES, family_shape, laid_out
from tests.layouts import (
    channels_last,
    contiguous,
    every_second_pixel_aligned,
    misaligned_channels_last,
    odd_unit_strides,
    sliced_channels_last,
    taps_apart,
)
from tests.reference import ACTIVATIONS, DTYPES, NORM_PARTS, Problem, Wanted, integer_problem, random_problem
from tests.shapes import shape_named, table
from tests.simt import binding, conv_norm_act, list_plans
from tests.simt.conv import _geometry
from tests.test_depthwise_kernels import with_value
from tests.test_family_plans import PARTLY_REFUSED, REFUSED
from tests.test_gemm_kernels import TAILS
from tests.test_stem_kernel import ALMOST_UNITS, CHUNKED, MANY_TILES, strided_problem

BEYOND_INT = 2**31

HALF = torch.zeros((), dtype=torch.float16)

ONE, TAIL = table("""
one  | 1x8x5x5 1x3x3  | one output channel
tail | 1x8x5x5 20x1x1 | whole vectors of channels and some left
""")


def subject(name: str) -> Subject:
    return Subject(Simulator(), BY_NAME[name], name)


def dense(problem: Problem) -> Problem:
    return laid_out(problem, channels_last)


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def listed(x: tuple[int, ...], weight: tuple[int, ...], **options: object) -> list[str]:
    """Plans for sizes that need no memory."""
    return list_plans(HALF.expand(x), HALF.expand(weight), **options)


def every_family() -> None:
    orders = cycle((None, "add_act", "act_add"))
    for family in FAMILIES:
        for dtype, shape in product(family.dtypes, family.nonempty()):
            runs = Subject(Simulator(), family, shape, dtype)
            problem = integer_problem(shape, dtype, Wanted("relu", residual_order=next(orders)))
            for layout in (channels_last, contiguous, misaligned_channels_last):
                given = laid_out(problem, layout)
                plans = runs.one_of_each(given) if layout == channels_last else runs.plans(given)[:1]
                runs.check(given, plans)


def every_epilogue() -> None:
    pointwise = family_shape("implicit_gemm_sm80", "pointwise")
    for runs in (subject("direct"), subject("implicit_gemm_sm80")):
        for dtype in DTYPES:
            for order in (None, "add_act", "act_add"):
                problem = dense(integer_problem(TAIL, dtype, Wanted(residual_order=order)))
                runs.check(problem, runs.one_of_each(problem))
            for norm, bias in product(NORM_PARTS, (False, True)):
                problem = integer_problem(TAIL, dtype, Wanted(norm=norm, bias=bias, norm_dtype=dtype))
                runs.check(problem, runs.plans(problem)[:1])
            problem = dense(integer_problem(pointwise, dtype, Wanted(residual_order="add_act")))
            layouts = (channels_last, misaligned_channels_last, every_second_pixel_aligned, contiguous)
            for layout in layouts:
                runs.check(problem.replace(residual=layout(problem.residual)), runs.plans(problem)[:1])
        for act, act_params in ACTIVATIONS.items():
            for shape, dtype, scale in ((TAIL, torch.float32, 12), (pointwise, torch.float16, 1)):
                problem = random_problem(shape, dtype, Wanted(act, act_params))
                problem = dense(problem.replace(x=problem.x * scale))
                runs.check_error(problem, runs.plans(problem)[:1])
    subject("implicit_gemm_sm80").check(dense(integer_problem(ONE, torch.float16)), ["implicit_gemm_sm80"])


def every_layout() -> None:
    chosen = subject("chosen")
    for name in ("channels_mod_4", "one_filter", "one_row", "one_column", "all_ones", "groups_wide"):
        problem = dense(integer_problem(shape_named(name), torch.float16))
        for layout in (sliced_channels_last, misaligned_channels_last):
            chosen.check(problem.replace(x=layout(problem.x)), [""])
            chosen.check(problem.replace(weight=layout(problem.weight)), [""])
        odd = problem.replace(x=odd_unit_strides(problem.x, 7), weight=odd_unit_strides(problem.weight, 7))
        chosen.check(odd, [""])
        if name in ("one_row", "one_column"):
            chosen.check(problem.replace(x=odd.x), ["implicit_gemm_sm80"])
    pointwise = dense(integer_problem(family_shape("implicit_gemm_sm80", "pointwise"), torch.float16))
    for changes in (
        {"x": sliced_channels_last(pointwise.x)},
        {"x": pointwise.x[:, :, ::2]},
        {"x": pointwise.x[:, :, :, ::2]},
        {"padding": (1, 0)},
        {"padding": (0, 1)},
        {"stride": (1, 2)},
    ):
        chosen.check(pointwise.replace(**changes), [""])
    for name in ("of_8", "of_4", "stride_over_filter"):
        problem = dense(integer_problem(family_shape("grouped", name), torch.float16))
        for layout in (sliced_channels_last, misaligned_channels_last):
            subject("grouped").check(problem.replace(x=layout(problem.x)), ["grouped"])
            subject("grouped").check(problem.replace(weight=layout(problem.weight)), ["grouped"])
    for shape in BY_NAME["grouped"].shapes:
        problem = dense(integer_problem(shape, torch.float16))
        subject("grouped").check(problem.replace(weight=taps_apart(problem.weight)), ["grouped"])
    for name in ALMOST_UNITS:
        subject("stem").check(strided_problem(name, torch.float16), ["stem"])


def every_sum_that_is_not_finite() -> None:
    """Of rows and channels that the output lacks too, over padding, through splits."""
    compensated = subject("implicit_gemm_tf32x3")
    strided, dilated = (family_shape("implicit_gemm_tf32x3", name) for name in ("strided", "accesses_of_8"))
    for shape, at in ((TAILS, (0, 3, 2, 2)), (strided, (0, 150, 3, 3)), (dilated, (0, 33, 7, 6))):
        for operand, place in (("x", at), ("weight", (7, 3, 0, 0))):
            problem = dense(integer_problem(shape, torch.float32, Wanted(norm="none")))
            problem = problem.replace(weight=without_zeros(problem.weight))
            getattr(problem, operand)[place] = math.inf
            compensated.check_not_finite(problem, compensated.one_of_each(problem))
    for shape, dtype in product(BY_NAME["depthwise_toeplitz"].shapes, HALVES):
        infinite = with_value(shape.name, dtype, math.inf, (0, 0))
        subject("depthwise_toeplitz").check_not_finite(infinite, ["depthwise_toeplitz"])


def every_plan_of_another_device() -> None:
    for shape in (*CHUNKED, MANY_TILES):
        subject("stem").check(integer_problem(shape, torch.float16), ["stem"], device="L4")
    subject("stem").check(integer_problem(MANY_TILES, torch.float16), ["stem 64x32x16"], device="L4")


def every_way_through_memory_on_hopper() -> None:
    """Residual and output with a map and without, in registers and in turns, alone and in clusters."""
    runs = subject("implicit_gemm_sm90")
    layouts = (channels_last, contiguous, misaligned_channels_last, every_second_pixel_aligned)
    for dtype, name in product(DTYPES, ("many_tiles", "accesses_of_4", "pointwise")):
        shape = family_shape(runs.family.name, name)
        for act, layout in product(("relu", "leaky_relu"), layouts):
            wanted = Wanted(act, (0.125,) if act == "leaky_relu" else (), residual_order="act_add")
            problem = dense(integer_problem(shape, dtype, wanted))
            problem = problem.replace(residual=layout(problem.residual))
            plans = runs.chance.sample(all_plans := runs.plans(problem), min(3, len(all_plans)))
            runs.check(problem, plans, out=layout(torch.zeros_like(problem.residual)))
    for dtype, act in product(DTYPES, ("relu", "leaky_relu")):
        wanted = Wanted(act, (0.125,) if act == "leaky_relu" else ())
        problem = dense(integer_problem(family_shape(runs.family.name, "late_layer"), dtype, wanted))
        plans = [p for p in runs.family.plans(problem, "H100") if "split 8" in p]
        runs.check(problem, plans[:2], device="H100")
    for name in ("many_tiles", "rows_and_columns"):
        problem = dense(integer_problem(family_shape(runs.family.name, name), torch.float16))
        with binding.failing_encode(binding.CONV):
            runs.check(problem, [f"{runs.family.name} 256x128x64", f"{runs.family.name} 128x128x64 pingpong"])
    strided = dense(integer_problem(family_shape(runs.family.name, "pointwise"), torch.float16))
    for x in (sliced_channels_last(strided.x), strided.x[:, :, ::2], strided.x[..., ::2]):
        runs.check(strided.replace(x=x), runs.plans(strided.replace(x=x))[:2])
    runs.check(dense(integer_problem(ONE, torch.float16)), [runs.family.name])


def every_answer_of_the_plan() -> None:
    for shape in (*REFUSED, *PARTLY_REFUSED):
        zero = HALF.float() if "float32" in shape.name else HALF
        list_plans(zero.expand(shape.x_size), zero.expand(shape.weight_size), **shape.options())
    for one_way in ({"stride": (1, 2)}, {"stride": (2, 1)}, {"dilation": (1, 2)}, {"dilation": (2, 1)}):
        listed((8, 8, 9, 9), (8, 1, 3, 3), groups=8, **one_way)
    # no channels, no images, and counts at their limits
    listed((1, 0, 4, 4), (8, 0, 1, 1), groups=2)
    listed((1, 0, 2, 2), (8, 0, 1, 1))
    listed((0, 3, 8, 8), (8, 3, 3, 3))
    listed((33, 8, 1, 1), (8, 8, 1, 1))
    listed((1, BEYOND_INT - 2048, 1, 1), (1, BEYOND_INT - 2048, 1, 1))
    listed((1 << 30, 32, 1, 1), (32, 8, 1, 1), groups=4)
    listed((1, 3, 1, 600_000), (8, 3, 1, 500_000))
    list_plans(HALF.float().expand(1, 3, 8, 8), HALF.float().expand(8, 3, 3, 3))
    # splits and large tiles
    listed((1, 2080, 2, 2), (8, 2080, 1, 1))
    listed((32, 64, 56, 56), (64, 64, 1, 1))
    listed((32, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1))
    list_plans(channels_last(torch.zeros(1, 64, 9, 9)), channels_last(torch.zeros(64, 64, 1, 1)))
    listed((8, 64, 9, 9), (64, 64, 1, 1), device="L4")
    listed((1, 8, 2, 40), (8, 8, 1, 33))


def every_refusal() -> None:
    weight = (8, 8, 1, 1)
    refused(lambda: listed((1, 8, BEYOND_INT, 1), weight), "padded input height")
    refused(lambda: listed((1, 8, 2, 2), weight, stride=(1, BEYOND_INT)), "the stride is")
    refused(lambda: listed((1, 8, 2, 2), weight, dilation=(BEYOND_INT, 1)), "the dilation is")
    refused(lambda: listed((1 << 20, 8, 1 << 15, 1 << 15), weight), "split the batch")
    problem = integer_problem(shape_named("odd_channels"), torch.float16)
    for plan, message in (
        ("direct 1x2x3", "no plan"),
        ("direct 64x64x3", "no plan"),
        ("implicit_gemm_sm80 64x64x32", "legal are"),
        ("cudnn", "only the operator"),
    ):
        refused(lambda plan=plan: problem.call(conv_norm_act, plan=plan), message)
    problem = integer_problem(shape_named("empty_batch"), torch.float16)
    geometry = _geometry(problem.x, problem.weight, (1, 1), (1, 1), (1, 1), 1, "H100", False)
    binding.run_conv(binding.ConvCall(act=b"relu", residual_order=b"add_act", **geometry))


def main() -> None:
    torch.set_num_threads(1)
    binding.CONV = "conv_coverage"
    every_answer_of_the_plan()
    every_refusal()
    every_layout()
    every_epilogue()
    every_sum_that_is_not_finite()
    every_plan_of_another_device()
    every_way_through_memory_on_hopper()
    every_family()


if __name__ == "__main__":
    main()
