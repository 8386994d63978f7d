"""What every kernel family is held to, in the simulator and on a GPU: tests/families.py has the families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def each(
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Callable[[Family, torch.dtype], Iterable[ConvShape]] | None = None,
) -> pytest.MarkDecorator:
    """Each family and each of its dtypes, with each of some shapes where these are given."""
    made = [
        pytest.param(family, dtype, *shape, id="-".join(map(str, (family, name_of(dtype), *shape))))
        for family in FAMILIES
        for dtype in family.dtypes
        if dtype in dtypes
        for shape in ([()] if shapes is None else [(shape,) for shape in shapes(family, dtype)])
    ]
    return pytest.mark.parametrize(("family", "dtype", "shape")[: 2 + (shapes is not None)], made)


each_told_shape = each(shapes=lambda family, dtype: family.told())

each_own_shape = pytest.mark.parametrize(
    ("family", "shape"),
    [
        pytest.param(family, shape, id=f"{family}-{shape}")
        for family in FAMILIES
        for shape in family.nonempty()
    ],
)
"""Each family and each of its shapes; the test chooses a dtype."""


@each(shapes=lambda family, dtype: [*family.shapes, *family.shared(dtype)])
def test_integers_are_exact(kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape) -> None:
    """On a family's own shapes every instantiation, on those that it shares with others some of the plans."""
    subject = Subject(kernels, family, shape, dtype)
    chance = subject.chance
    wanted = Wanted(*chance.choice(EXACT_ACTIVATIONS), residual_order=chance.choice(RESIDUAL_ORDERS))
    problem = integer_problem(shape, dtype, wanted)
    expected = expected_rounded(problem)
    for layout in (channels_last, contiguous, misaligned_channels_last):
        given = laid_out(problem, layout)
        plans = subject.plans(given)
        if layout == channels_last:
            plans = family.some(plans, chance) if shape in family.shapes else chance.choices(plans, k=2)
        else:
            plans = chance.choices(plans, k=1)
        subject.check(given, plans, expected)


@each(shapes=lambda family, dtype: family.measured())
def test_random_inputs_stay_within_the_error_bound(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    for residual_order in RESIDUAL_ORDERS:
        problem = random_case(shape, dtype, Wanted("relu", residual_order=residual_order))
        problem = laid_out(problem, subject.chance.choice(family.formats))
        plans = subject.plans(problem)
        subject.check_error(problem, [plans[0] if residual_order is None else subject.chance.choice(plans)])


@pytest.mark.parametrize("act", ACTIVATIONS)
@each()
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
        subject.check_error(problem, [subject.chance.choice(subject.one_of_each(problem))])


@pytest.mark.parametrize("norm", NORM_PARTS)
@each()
def test_every_combination_of_norm_parameters(
    kernels: Backend, family: Family, dtype: torch.dtype, norm: str
) -> None:
    subject = Subject(kernels, family, norm, dtype)
    first, second, *_ = family.told()
    for bias in (False, True):
        for norm_dtype in dict.fromkeys((torch.float32, dtype)):
            wanted = Wanted(norm=norm, bias=bias, norm_dtype=norm_dtype)
            problem = laid_out(integer_problem(second, dtype, wanted), family.formats[0])
            subject.check(problem, [subject.chance.choice(subject.one_of_each(problem))])
            problem = laid_out(random_case(first, dtype, wanted), family.formats[0])
            subject.check_error(problem, [subject.chance.choice(subject.one_of_each(problem))])


@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@each(HALVES)
def test_results_are_rounded_once(
    kernels: Backend, family: Family, dtype: torch.dtype, residual_order: str
) -> None:
    """One rounding to nearest costs about 0.42 u in the mean square; a second one would make that 0.6."""
    subject = Subject(kernels, family, dtype)
    wanted = Wanted("leaky_relu", (0.1,), residual_order=residual_order)
    problem = laid_out(random_problem(family.told()[0], dtype, wanted), family.formats[0])
    for plan in subject.one_of_each(problem):
        error = relative_error(subject.run(problem, plan), expected_exactly(problem)) / unit_roundoff(dtype)
        assert error < 0.45, f"{plan}: {error:.3f} u"


@pytest.mark.parametrize("exponent", [-21, -16, 8, 10])
@each([torch.float16])
def test_float16_rounds_at_both_ends_of_its_range(
    kernels: Backend, family: Family, dtype: torch.dtype, exponent: int
) -> None:
    """Subnormal results and overflow to infinity, as the formula rounded once gives them."""
    subject = Subject(kernels, family, exponent)
    problem = integer_problem(family.told()[0], dtype, Wanted("leaky_relu", (0.125,)))
    assert problem.norm_weight is not None
    scale = torch.full_like(problem.norm_weight, 2.0**exponent)
    problem = problem.replace(norm_weight=scale, norm_bias=torch.zeros_like(scale))
    expected = expected_rounded(problem)
    assert expected.isinf().any() or (expected.abs() < 2.0**-14).any()
    given = laid_out(problem, family.formats[0])
    subject.check(given, subject.one_of_each(given), expected)


@each(HALVES)
def test_sums_beyond_float16_stay_finite_until_the_store(
    kernels: Backend, family: Family, dtype: torch.dtype
) -> None:
    """The largest values a type has, which the fold brings back into its range."""
    subject = Subject(kernels, family, dtype)
    shape = family.told()[0]
    problem = laid_out(random_case(shape, dtype, Wanted("relu")), family.formats[0])
    problem = problem.replace(x=torch.full_like(problem.x, 60000.0), running_var=torch.full((shape.k,), 1e12))
    assert expected_exactly(problem).isfinite().all()
    subject.check_error(problem, subject.one_of_each(problem))


@each()
def test_operands_in_any_layout(kernels: Backend, family: Family, dtype: torch.dtype) -> None:
    """Each layout with two of the telling shapes, other ones for each dtype."""
    subject = Subject(kernels, family, dtype)
    told = subject.chance.sample(family.told(), len(family.told()))
    for turn, layout in enumerate(LAYOUTS):
        for shape in (told[turn % len(told)], told[(turn + 1) % len(told)]):
            check_layouts(subject, shape, dtype, layout)


def check_layouts(subject: Subject, shape: ConvShape, dtype: torch.dtype, layout: Layout) -> None:
    """Operands one after the other in the layout, and all of them; they are only read."""
    problem = laid_out(integer_problem(shape, dtype, Wanted("relu", residual_order="add_act")), channels_last)
    assert problem.residual is not None
    for given in (
        problem.replace(x=layout(problem.x)),
        problem.replace(weight=layout(problem.weight)),
        problem.replace(weight=taps_apart(problem.weight), x=layout(problem.x)),
        problem.replace(residual=layout(problem.residual)),
        problem.map(lambda tensor: layout(tensor) if tensor.dim() == 4 else vector_every_third(tensor)),
    ):
        placed = subject.kernels.place(given)
        before = memory_of(placed)
        subject.check(placed, [subject.chance.choice(subject.one_of_each(placed))])
        assert all(map(torch.equal, memory_of(placed), before)), "an operand was written"


@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@each(shapes=lambda family, dtype: family.told()[:2])
def test_every_instantiation_adds_a_residual_in_any_layout(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape, residual_order: str
) -> None:
    """Some kernels copy it several turns ahead, as wide as it is aligned."""
    subject = Subject(kernels, family, shape, dtype)
    problem = laid_out(
        integer_problem(shape, dtype, Wanted("relu", residual_order=residual_order)), channels_last
    )
    assert problem.residual is not None
    expected = expected_rounded(problem)
    layouts = (channels_last, every_second_pixel_aligned, misaligned_channels_last, contiguous)
    for layout in layouts if residual_order == "add_act" else layouts[1:2]:
        given = problem.replace(residual=layout(problem.residual))
        subject.check(given, subject.one_of_each(given), expected)


@each_own_shape
def test_strides_of_single_elements_are_not_read(kernels: Backend, family: Family, shape: ConvShape) -> None:
    subject = Subject(kernels, family, shape)
    problem = integer_problem(shape, subject.chance.choice(family.dtypes))
    expected = expected_rounded(problem)
    for layout, stride in ((channels_last, 0), (contiguous, 7), (channels_last, 2**40)):
        given = laid_out(problem, layout).map(lambda tensor, to=stride: odd_unit_strides(tensor, to))
        subject.check(given, [subject.chance.choice(subject.one_of_each(given))], expected)


@each(shapes=lambda family, dtype: family.nonempty())
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
        expected = subject.check_not_finite(given, [subject.chance.choice(subject.one_of_each(given))])
        assert not expected.isfinite().all()


@each_told_shape
def test_what_is_not_finite_in_a_filter_reaches_its_channel_and_no_others(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    for value in NOT_FINITE:
        problem = laid_out(integer_problem(shape, dtype), family.formats[0])
        problem.weight[shape.k // 2] = value
        expected = subject.check_not_finite(problem, subject.one_of_each(problem))
        assert not expected[:, shape.k // 2].isfinite().any()
        assert expected[:, torch.arange(shape.k) != shape.k // 2].isfinite().all()


@each_told_shape
def test_results_repeat_bit_for_bit_in_any_thread_order(
    kernels: Backend, family: Family, dtype: torch.dtype, shape: ConvShape
) -> None:
    subject = Subject(kernels, family, shape, dtype)
    problem = laid_out(random_problem(shape, dtype, Wanted("silu", residual_order="add_act")), channels_last)
    subject.check_repeats(problem, subject.one_of_each(problem))


@each_own_shape
def test_it_writes_where_it_is_told(kernels: Backend, family: Family, shape: ConvShape) -> None:
    """Into memory of its own, and into memory that holds the residual; nothing beside it is touched."""
    subject = Subject(kernels, family, shape)
    dtype, order = subject.chance.choice(family.dtypes), subject.chance.choice(("add_act", "act_add"))
    problem = laid_out(integer_problem(shape, dtype, Wanted("relu", residual_order=order)), channels_last)
    assert problem.residual is not None
    expected = expected_rounded(problem)
    plans = subject.one_of_each(problem)
    for turn, target in enumerate(subject.chance.choices(TARGETS, k=max(len(plans), 5))):
        check_writes(subject, problem, plans[turn % len(plans)], target, expected)


def check_writes(subject: Subject, problem: Problem, plan: str, target: Layout, expected: Tensor) -> None:
    kernels, placed = subject.kernels, subject.kernels.place(problem)
    extra = {"plan": plan, "allow_tf32": subject.family.allow_tf32, **kernels.on(subject.family.device)}
    for in_place in (False, True):
        out = target(placed.residual.clone() if in_place else torch.zeros_like(placed.residual))
        surroundings = Surroundings(out)
        given = placed.replace(residual=out) if in_place else placed
        assert kernels.run(given, out=out, **extra, **kernels.thread_order(1)) is out
        wrong = difference(out.cpu(), expected)
        assert not wrong, f"{plan} {target.__name__}: {wrong}"
        assert surroundings.are_untouched(), f"{plan} {target.__name__}"


@each_own_shape
def test_sanitizers_accept_it(family: Family, shape: ConvShape) -> None:
    subject = Subject(Simulator(), family, shape)
    chance = subject.chance
    problem = integer_problem(shape, chance.choice(family.dtypes), Wanted(residual_order="act_add"))
    expected = expected_rounded(problem)
    given = laid_out(problem, chance.choice((contiguous, channels_last, sliced_channels_last)))
    given = given.replace(residual=chance.choice(TARGETS)(problem.residual))
    plan = chance.choice(subject.one_of_each(given))
    out = chance.choice((None, given.residual))
    assert torch.equal(subject.run(given, plan, out=out, sanitized=True), expected), plan


@each_told_shape
def test_it_waits_for_the_kernel_ahead(family: Family, dtype: torch.dtype, shape: ConvShape) -> None:
    """Started early it reads no operand, and writes nothing, before that has ended. Simulated only."""
    subject = Subject(Simulator(), family, shape, dtype)
    wanted = Wanted("relu", residual_order="add_act")
    problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
    plans = subject.one_of_each(problem)
    subject.check(problem, plans, starts_early=True)
    subject.check(problem, plans[:1], starts_early=True, sanitized=True)


@each([torch.float32], lambda family, dtype: family.told() if family.allow_tf32 else ())
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
        for plan in subject.chance.sample(subject.one_of_each(given), 1):
            error = relative_error(subject.run(given, plan), rounded)
            assert error <= error_bound(dtype), f"{plan}: {error:.3g} from the product of rounded operands"


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of fraction, to nearest, ties away from zero."""
    return truncated_to_tf32((tensor.contiguous().view(torch.int32) + 0x1000).view(torch.float32))


def truncated_to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of fraction, towards zero."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@each()
def test_plans_are_those_of_the_table(family: Family, dtype: torch.dtype) -> None:
    """The shapes reach every instantiation, and the family takes the shapes that its row says."""
    reached = set()
    for shape in (*SHAPES, *family.shapes):
        if shape.n > 0:
            plans = family.plans(laid_out(integer_problem(shape, dtype), channels_last), family.device)
            reached |= {family.instantiation(plan) for plan in plans}
            assert bool(plans) == (shape in family.shapes or family.takes(shape, dtype)), shape
    assert reached == family.instantiations(dtype)


def test_no_kernel_is_left_out() -> None:
    names = {family.name for family in FAMILIES}
    assert names - {"chosen"} == set(fused_cna.build_info()["kernels"])
