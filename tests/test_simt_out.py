"""``out=`` in the simulator: every kernel writes where it is told, and nowhere else is written unseen."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.layouts import Surroundings, channels_last, sliced, transposed
from tests.reference import DTYPES, Problem, Wanted, expected_rounded, integer_problem
from tests.shapes import SHAPES, ConvShape, shape_named
from tests.simt import SimulatorError, binding, conv, conv_norm_act, list_plans
from tests.test_simt_implicit_gemm import LARGER


def slice_of(like: Tensor, before: int, behind: int) -> Tensor:
    """A channel slice, with the values of `like`, of a channels_last tensor with more channels around it."""
    n, k, p, q = like.shape
    big = torch.full((n, p, q, before + k + behind), torch.nan, dtype=like.dtype).permute(0, 3, 1, 2)
    return big[:, before : before + k].copy_(like)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "aligned_slice": lambda like: slice_of(like, 16, 8 + -like.shape[1] % 8),
    "odd_slice": lambda like: slice_of(like, 5, 2),
    "window_of_nchw": sliced,
    "columns_outermost": transposed,
}


def plans_for(problem: Problem) -> list[str]:
    options = {name: getattr(problem, name) for name in ("stride", "padding", "dilation", "groups")}
    return list_plans(problem.x, problem.weight, allow_tf32=True, **options)


def one_of_each(plans: list[str], parts: int, chance: random.Random) -> list[str]:
    """A plan for each beginning of so many words: 1 for the kernel, 2 for the tile too."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for plan in plans:
        kinds.setdefault(tuple(plan.split()[:parts]), []).append(plan)
    return [chance.choice(kind) for kind in kinds.values()]


def check(problem: Problem, plan: str, target: str, seed: int) -> None:
    """Into memory of its own, and into memory that holds the residual."""
    expected = expected_rounded(problem)
    assert problem.residual is not None
    out, in_place = TARGETS[target](torch.zeros_like(expected)), TARGETS[target](problem.residual)
    for written, given in ((out, problem), (in_place, problem.replace(residual=in_place))):
        surroundings = Surroundings(written)
        assert given.call(conv_norm_act, out=written, plan=plan, allow_tf32=True, seed=seed) is written
        assert torch.equal(written, expected), (target, plan, given is problem)
        assert surroundings.are_untouched(), (target, plan)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.n > 0], ids=str)
def test_every_kernel_writes_where_it_is_told(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    wanted = Wanted("relu", residual_order=chance.choice(("add_act", "act_add")))
    problem = integer_problem(shape, chance.choice(DTYPES), wanted)
    problem = problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))
    for plan in one_of_each(plans_for(problem), 1, chance):
        for target in TARGETS:
            check(problem, plan, target, chance.randrange(1000))


@pytest.mark.parametrize("shape", [LARGER[1], LARGER[3]], ids=str)
def test_every_tile_writes_where_it_is_told(shape: ConvShape) -> None:
    chance = random.Random(shape.name)
    problem = integer_problem(shape, chance.choice(DTYPES), Wanted("relu", residual_order="add_act"))
    problem = problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))
    tiles = one_of_each(plans_for(problem), 2, chance)
    assert len(tiles) > 8
    for plan in tiles:
        check(problem, plan, chance.choice(list(TARGETS)), chance.randrange(1000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_a_split_writes_where_it_is_told(dtype: torch.dtype) -> None:
    problem = integer_problem(shape_named("many_chunks"), dtype, Wanted("relu", residual_order="act_add"))
    problem = problem.replace(x=channels_last(problem.x), weight=channels_last(problem.weight))
    splits = [plan for plan in plans_for(problem) if " split " in plan and " split 1 " not in plan]
    assert len(splits) > 4
    for seed, (plan, target) in enumerate(zip(splits, TARGETS, strict=False)):
        check(problem, plan, target, seed)


@pytest.mark.parametrize("name", ["odd_channels", "groups_narrow", "3x3"])
def test_sanitizers_accept_it(name: str) -> None:
    problem = integer_problem(shape_named(name), torch.float16, Wanted("relu", residual_order="add_act"))
    assert problem.residual is not None
    for make in TARGETS.values():
        out = make(problem.residual)
        problem.replace(residual=out).call(conv_norm_act, out=out, sanitized=True)
        assert torch.equal(out, expected_rounded(problem))


def test_an_image_without_batch_dimension() -> None:
    problem = integer_problem(shape_named("odd_channels"), torch.float32)
    expected = expected_rounded(problem)[0]
    out = slice_of(expected[None], 3, 2)[0]
    assert problem.replace(x=problem.x[0]).call(conv_norm_act, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("misalignment", [0, 2, 6, 8])
def test_the_kernel_sees_the_alignment_of_out(misalignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    run = binding.run_conv
    monkeypatch.setattr(conv.binding, "run_conv", lambda call: (addresses.append(call.y.data), run(call))[1])
    problem = integer_problem(shape_named("3x3"), torch.float16)
    memory = torch.zeros(8 * 8 * 8 + 8, dtype=torch.float16)
    out = memory[misalignment // 2 :][: 8 * 8 * 8].view(1, 8, 8, 8)
    problem.call(conv_norm_act, out=out)
    assert torch.equal(out, expected_rounded(problem))
    assert addresses[0] % 16 == out.data_ptr() % 16 == misalignment


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("first", "count", "message"),
    [
        (0, 0, None),
        (-3, 1, r"wrote 1 elements outside its output of \d+: the first at -3 from its start$"),
        (6, 1, r"wrote 1 elements outside its output of \d+: the first at 6 from its start, between its el"),
        (4, 4, r"wrote 3 elements outside its output of \d+: the first at 5 from its start, between its el"),
    ],
)
def test_writes_between_the_elements_are_seen(
    dtype: torch.dtype, first: int, count: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that writes its slice, pixel by pixel, and then `count` elements from element `first` on."""
    problem = integer_problem(ConvShape("five", 1, 2, 3, 4, 5, 1, 1, "pixels of 5 channels in 8"), dtype)
    out = slice_of(torch.zeros(1, 5, 3, 4, dtype=dtype), 1, 2)

    def write(call: binding.ConvCall) -> None:
        pixels = [(pixel * 8, 5) for pixel in range(12)]
        for start, elements in (*pixels, (first, count)):
            binding.ctypes.memset(call.y.data + start * dtype.itemsize, 0, elements * dtype.itemsize)

    monkeypatch.setattr(conv.binding, "run_conv", write)
    if message is None:
        assert torch.count_nonzero(problem.call(conv_norm_act, out=out)) == 0
        return
    with pytest.raises(SimulatorError, match=message):
        problem.call(conv_norm_act, out=out)
