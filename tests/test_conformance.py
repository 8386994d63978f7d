"""What every kernel family is held to, in the simulator and on a GPU: tests/families.py has the families."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

import fused_cna
from tests.conformance import Subject, memory_of, pixels_read, random_case, without_zeros
from tests.conftest import Backend, Simulator
from tests.families import FAMILIES, HALVES, Family, laid_out
from tests.layouts import (
    LAYOUTS,
    Layout,
    Surroundings,
    aligned_channel_slice,
    channel_slice,
    channels_last,
    contiguous,
    every_second_pixel_aligned,
    far_unit_strides,
    misaligned_channels_last,
    odd_unit_strides,
    sliced_channels_last,
    taps_apart,
    vector_every_third,
)
from tests.reference import (
    ACTIVATIONS,
    DTYPES,
    EXACT_ACTIVATIONS,
    NORM_PARTS,
    Problem,
    Wanted,
    difference,
    error_bound,
    expected_exactly,
    expected_rounded,
    integer_problem,
    random_problem,
    relative_error,
    unit_roundoff,
)
from tests.shapes import SHAPES, ConvShape

RESIDUAL_ORDERS = (None, "add_act", "act_add")

TARGETS = (
    *(channel_slice, aligned_channel_slice, every_second_pixel_aligned, far_unit_strides),
    *(layout for layout in LAYOUTS if "expanded" not in layout.__name__),
)
"""Memory that `out` may lie in: in most with elements around or between that nothing may write."""

NOT_FINITE = (math.nan, math.inf, -math.inf)


KERNELS = tuple(family for family in FAMILIES if family.name != "chosen")
"""The plan's choice is one of their plans: it is held to the tests of exactness and error alone."""


def each(
    shapes: Callable[[Family, torch.dtype], Iterable[ConvShape]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    families: Sequence[Family] = KERNELS,
) -> pytest.MarkDecorator:
    """Each family and each of its dtypes, with each of some shapes."""
    return parametrized(
        "shape",
        (
            (family, dtype, shape)
            for family in families
            for dtype in family.dtypes
            if dtype in dtypes
            for shape in shapes(family, dtype)
        ),
    )


def in_turn(name: str, values: Callable[[Family], Iterable[object]]) -> pytest.MarkDecorator:
    """Each family with each of some values; the next value has the next of the family's dtypes."""
    return parametrized(
        name,
        (
            (family, dtype, value)
            for family in KERNELS
            for dtype, value in zip(itertools.cycle(family.dtypes), values(family), strict=False)
        ),
    )


def parametrized(name: str, cases: Iterable[tuple[Family, torch.dtype, object]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("family", "dtype", name), [pytest.param(*case, id="-".join(map(named, case))) for case in cases]
    )


def named(part: object) -> str:
    return getattr(part, "__name__", str(part).removeprefix("torch."))


each_telling_shape = in_turn("shape", Family.told)
each_own_shape = in_turn("shape", Family.nonempty)
each_half = each(lambda family, dtype: family.told()[:1], HALVES)


@cache
def plans_to_run(family: Family, dtype: torch.dtype, device: str | None) -> dict[ConvShape, list[str]]:
    """A plan for every shape; each instantiation at three of the family's own shapes that reach it."""
    chance = random.Random(f"{family} {dtype}")
    plans: dict[ConvShape, list[str]] = {}
    places = defaultdict(list)
    for shape in (*family.shapes, *family.shared(dtype)):
        legal = family.plans(laid_out(integer_problem(shape, dtype), channels_last), device)
        plans[shape] = [chance.choice(legal)]
        if shape in family.shapes:
            for plan in family.one_of_each(legal, chance):
                places[family.instantiation(plan)].append((shape, plan))
    for found in places.values():
        for shape, plan in chance.sample(found, min(len(found), 3)):
            plans[shape].append(plan)
    return plans


@each(lambda family, dtype: [*family.shapes, *family.shared(dtype)], families=FAMILIES)
def test_integers_are_exact(kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape) -> None:
    subject = Subject(kernels, family, shape, dtype)
    chance = subject.chance
    wanted = Wanted(*chance.choice(EXACT_ACTIVATIONS), residual_order=chance.choice(RESIDUAL_ORDERS))
    problem = integer_problem(shape, dtype, wanted)
    given = laid_out(problem, channels_last)
    expected = expected_rounded(problem)
    plans = plans_to_run(family, dtype, kernels.planned_for(family.device))[shape]
    subject.check(given, dict.fromkeys(plans), expected)
    given = laid_out(problem, chance.choice((contiguous, misaligned_channels_last)))
    subject.check(given, [chance.choice(subject.plans(given))], expected)


@each(lambda family, dtype: family.measured(), families=FAMILIES)
def test_random_inputs_stay_within_the_error_bound(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    order = subject.chance.choice(RESIDUAL_ORDERS)
    problem = random_case(shape, dtype, Wanted("relu", residual_order=order))
    problem = laid_out(problem, subject.chance.choice(family.formats))
    subject.check_error(problem, [subject.chance.choice(subject.plans(problem))])


@in_turn("act", lambda family: ACTIVATIONS)
def test_every_activation(kernels: Backend, family: Family, dtype: torch.dtype, act: str) -> None:
    """With each residual order, in outputs whose channels are dense and whose pixels are."""
    subject = Subject(kernels, family, act, dtype)
    layouts = (channels_last, contiguous, channels_last)
    for residual_order, layout in zip(RESIDUAL_ORDERS, layouts, strict=True):
        wanted = Wanted(act, ACTIVATIONS[act], norm_dtype=dtype, residual_order=residual_order, seed=1)
        problem = random_case(family.told()[0], dtype, wanted)
        # where the operands are rounded, large ones leave little but differences of roundings
        scale = 4 if family.error(dtype) == error_bound(dtype) else 1
        problem = laid_out(problem.replace(x=problem.x * scale), layout)
        subject.check_error(problem, [subject.chance.choice(subject.plans(problem))])


@in_turn("norm", lambda family: NORM_PARTS)
def test_every_combination_of_norm_parameters(
    kernels: Backend, family: Family, dtype: torch.dtype, norm: str
) -> None:
    subject = Subject(kernels, family, norm, dtype)
    first, second, *_ = family.told()
    for bias in (False, True):
        for norm_dtype in dict.fromkeys((torch.float32, dtype)):
            wanted = Wanted(norm=norm, bias=bias, norm_dtype=norm_dtype)
            problem = laid_out(integer_problem(second, dtype, wanted), family.formats[0])
            subject.check(problem, [subject.chance.choice(subject.plans(problem))])
            problem = laid_out(random_case(first, dtype, wanted), family.formats[0])
            subject.check_error(problem, [subject.chance.choice(subject.plans(problem))])


@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@each_half
def test_results_are_rounded_once(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape, residual_order: str
) -> None:
    """One rounding to nearest costs about 0.42 u in the mean square; a second one would make that 0.6."""
    subject = Subject(kernels, family, dtype)
    wanted = Wanted("leaky_relu", (0.1,), residual_order=residual_order)
    problem = laid_out(random_problem(shape, dtype, wanted), family.formats[0])
    for plan in subject.one_of_each(problem):
        error = relative_error(subject.run(problem, plan), expected_exactly(problem)) / unit_roundoff(dtype)
        assert error < 0.45, f"{plan}: {error:.3f} u"


@pytest.mark.parametrize("exponent", [-21, -16, 8, 10])
@each(lambda family, dtype: family.told()[:1], [torch.float16])
def test_float16_rounds_at_both_ends_of_its_range(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape, exponent: int
) -> None:
    """Subnormal results and overflow to infinity, as the formula rounded once gives them."""
    subject = Subject(kernels, family, exponent)
    problem = integer_problem(shape, dtype, Wanted("leaky_relu", (0.125,)))
    assert problem.norm_weight is not None
    scale = torch.full_like(problem.norm_weight, 2.0**exponent)
    problem = problem.replace(norm_weight=scale, norm_bias=torch.zeros_like(scale))
    expected = expected_rounded(problem)
    assert expected.isinf().any() or (expected.abs() < 2.0**-14).any()
    given = laid_out(problem, family.formats[0])
    subject.check(given, subject.one_of_each(given), expected)


@each_half
def test_sums_beyond_float16_stay_finite_until_the_store(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    """The largest values a type has, which the fold brings back into its range."""
    subject = Subject(kernels, family, dtype)
    problem = laid_out(random_case(shape, dtype, Wanted("relu")), family.formats[0])
    problem = problem.replace(x=torch.full_like(problem.x, 60000.0), running_var=torch.full((shape.k,), 1e12))
    assert expected_exactly(problem).isfinite().all()
    subject.check_error(problem, subject.one_of_each(problem))


@in_turn("layout", lambda family: LAYOUTS)
def test_operands_in_any_layout(kernels: Backend, family: Family, dtype: torch.dtype, layout: Layout) -> None:
    """Operands one after the other in the layout, and all of them; they are only read."""
    subject = Subject(kernels, family, layout.__name__)
    wanted = Wanted("relu", residual_order="add_act")
    problem = laid_out(integer_problem(subject.chance.choice(family.told()), dtype, wanted), channels_last)
    assert problem.residual is not None
    for given in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(weight=taps_apart(problem.weight), x=layout(problem.x)),
        problem.replace(residual=layout(problem.residual)),
        problem.map(lambda tensor: layout(tensor) if tensor.dim() == 4 else vector_every_third(tensor)),
    ):
        placed = kernels.place(given)
        before = memory_of(placed)
        subject.check(placed, [subject.chance.choice(subject.plans(placed))])
        assert all(map(torch.equal, memory_of(placed), before)), "an operand was written"


@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@in_turn("shape", lambda family: family.told()[:2])
def test_every_instantiation_adds_a_residual_in_any_layout(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape, residual_order: str
) -> None:
    """Some kernels copy it several turns ahead, as wide as it is aligned."""
    subject = Subject(kernels, family, shape, dtype)
    wanted = Wanted("relu", residual_order=residual_order)
    problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
    assert problem.residual is not None
    expected = expected_rounded(problem)
    layouts = (channels_last, every_second_pixel_aligned, misaligned_channels_last, contiguous)
    for layout in layouts if residual_order == "add_act" else layouts[1:2]:
        given = problem.replace(residual=layout(problem.residual))
        subject.check(given, subject.one_of_each(given), expected)


@each_own_shape
def test_strides_of_single_elements_are_not_read(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape)
    problem = integer_problem(shape, dtype)
    layout, stride = subject.chance.choice(((channels_last, 0), (contiguous, 7), (channels_last, 2**40)))
    given = laid_out(problem, layout).map(lambda tensor: odd_unit_strides(tensor, stride))
    subject.check(given, [subject.chance.choice(subject.plans(given))], expected_rounded(problem))


@each_own_shape
def test_what_is_not_finite_in_x_reaches_the_outputs_that_read_it_and_no_others(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    """Neither a neighbouring group nor what pads a step: zero times infinity is a NaN."""
    subject = Subject(kernels, family, shape, dtype)
    problem = integer_problem(shape, dtype)
    problem = problem.replace(weight=without_zeros(problem.weight))
    group = shape.c // shape.groups
    pixels = pixels_read(shape)
    assert pixels, "every output reads padding alone"
    values = subject.chance.sample(NOT_FINITE, 3)
    for (h, w), channel, value in zip(pixels, (0, group - 1, shape.c - 1), values, strict=False):
        given = laid_out(problem.replace(x=problem.x.clone()), subject.chance.choice(family.formats))
        given.x[-1, channel, h, w] = value
        expected = subject.check_not_finite(given, [subject.chance.choice(subject.plans(given))])
        assert not expected.isfinite().all()


@each_telling_shape
def test_what_is_not_finite_in_a_filter_reaches_its_channel_and_no_others(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    problem = laid_out(integer_problem(shape, dtype), family.formats[0])
    for plan, value in zip(subject.one_of_each(problem), itertools.cycle(NOT_FINITE), strict=False):
        problem.weight[shape.k // 2] = value
        expected = subject.check_not_finite(problem, [plan])
        assert not expected[:, shape.k // 2].isfinite().any()
        assert expected[:, torch.arange(shape.k) != shape.k // 2].isfinite().all()


@each_telling_shape
def test_results_repeat_bit_for_bit_in_any_thread_order(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    problem = laid_out(random_problem(shape, dtype, Wanted("silu", residual_order="add_act")), channels_last)
    subject.check_repeats(problem, subject.one_of_each(problem))


@each_own_shape
def test_it_writes_where_it_is_told(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    """Into memory of its own, and into memory that holds the residual; nothing beside it is touched."""
    subject = Subject(kernels, family, shape)
    order = subject.chance.choice(("add_act", "act_add"))
    problem = laid_out(integer_problem(shape, dtype, Wanted("relu", residual_order=order)), channels_last)
    assert problem.residual is not None
    expected = expected_rounded(problem)
    plans = subject.one_of_each(problem)
    for target, in_place in zip(subject.chance.sample(TARGETS, 4), (False, True) * 2, strict=True):
        check_writes(subject, problem, subject.chance.choice(plans), target, in_place, expected)


def check_writes(
    subject: Subject, problem: Problem, plan: str, target: Layout, in_place: bool, expected: Tensor
) -> None:
    kernels, placed = subject.kernels, subject.kernels.place(problem)
    extra = {"plan": plan, "allow_tf32": subject.family.allow_tf32, **kernels.on(subject.family.device)}
    out = target(placed.residual.clone() if in_place else torch.zeros_like(placed.residual))
    surroundings = Surroundings(out)
    given = placed.replace(residual=out) if in_place else placed
    assert kernels.run(given, out=out, **extra, **kernels.thread_order(1)) is out
    wrong = difference(out.cpu(), expected)
    assert not wrong, f"{plan} {target.__name__}: {wrong}"
    assert surroundings.are_untouched(), f"{plan} {target.__name__}"


@each_own_shape
def test_sanitizers_accept_it(family: Family, dtype: torch.dtype, shape: ConvShape) -> None:
    subject = Subject(Simulator(), family, shape)
    chance = subject.chance
    problem = integer_problem(shape, dtype, Wanted(residual_order="act_add"))
    expected = expected_rounded(problem)
    given = laid_out(problem, chance.choice((contiguous, channels_last, sliced_channels_last)))
    given = given.replace(residual=chance.choice(TARGETS)(problem.residual))
    plan = chance.choice(subject.one_of_each(given))
    out = chance.choice((None, given.residual))
    assert torch.equal(subject.run(given, plan, out=out, sanitized=True), expected), plan


@each_telling_shape
def test_it_waits_for_the_kernel_ahead(family: Family, dtype: torch.dtype, shape: ConvShape) -> None:
    """Started early it reads no operand, and writes nothing, before that has ended. Simulated only."""
    subject = Subject(Simulator(), family, shape, dtype)
    wanted = Wanted("relu", residual_order="add_act")
    problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
    plans = subject.one_of_each(problem)
    subject.check(problem, plans, starts_early=True)
    subject.check(problem, plans[:1], starts_early=True, sanitized=True)


@each(lambda family, dtype: family.told() if family.allow_tf32 else (), [torch.float32])
def test_tf32_rounds_operands_once_and_nothing_else(
    family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    """Simulated only: how tensor cores round their sums is not documented."""
    subject = Subject(Simulator(), family, shape)
    problem = random_case(shape, dtype, Wanted("relu", residual_order="add_act"))
    rounded, truncated = (
        expected_exactly(problem.replace(x=to_tf32(problem.x), weight=to_tf32(problem.weight)))
        for to_tf32 in (rounded_to_tf32, truncated_to_tf32)
    )
    exact = expected_exactly(problem)
    assert relative_error(rounded, exact) <= family.error(dtype)
    assert relative_error(truncated, exact) > family.error(dtype), "the bound would let truncation pass"
    for layout in (*family.formats, sliced_channels_last):
        given = laid_out(problem, layout)
        plan = subject.chance.choice(subject.plans(given))
        error = relative_error(subject.run(given, plan), rounded)
        assert error <= error_bound(dtype), f"{plan}: {error:.3g} from the product of rounded operands"


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of fraction, to nearest, ties away from zero."""
    return truncated_to_tf32((tensor.contiguous().view(torch.int32) + 0x1000).view(torch.float32))


def truncated_to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of fraction, towards zero."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_plans_are_those_of_the_table(family: Family) -> None:
    """The family takes the shapes that its row says, and the exact tests run every instantiation."""
    for dtype in family.dtypes:
        for shape in SHAPES:
            if shape.n > 0:
                plans = family.plans(laid_out(integer_problem(shape, dtype), channels_last), family.device)
                assert bool(plans) == family.takes(shape, dtype), shape
        run = itertools.chain.from_iterable(plans_to_run(family, dtype, family.device).values())
        assert set(map(family.instantiation, run)) == family.instantiations(dtype)


def test_no_kernel_is_left_out() -> None:
    names = {family.name for family in FAMILIES}
    assert names - {"chosen"} == set(fused_cna.build_info()["kernels"])
