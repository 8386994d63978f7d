"""Which memory ``out=`` refuses, where, and in which words; and the search for elements that overlap."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from fused_cna import _memory
from fused_cna._memory import View, overlaps, overlaps_itself
from tests.bad_inputs import BAD, BASE
from tests.conftest import needs_gpu
from tests.layouts import moved
from tests.reference import Problem, Wanted, assert_close_in_any_order, random_problem, three_steps
from tests.shapes import ConvShape

operator = torch.ops.fused_cna.conv_norm_act_out

SIZE = (2, 8, 6, 5)
UNTOUCHED = 7.0


def run_front(problem: Problem, out: Tensor) -> None:
    problem.call(fused_cna.conv_norm_act, out=out)


def run_operator(problem: Problem, out: Tensor) -> None:
    operator(*problem.operator_arguments(), out)


def run_fake(problem: Problem, out: Tensor) -> None:
    with FakeTensorMode() as mode:
        run_operator(problem.map(mode.from_tensor), mode.from_tensor(out))


def run_kernel_checks(problem: Problem, out: Tensor) -> None:
    if not hasattr(torch.ops.fused_cna, "_check_out"):
        pytest.skip(f"needs the compiled extension: {fused_cna.build_info()['reason']}")
    torch.ops.fused_cna._check_out(*problem.operator_arguments(), out)


def run_simulator(problem: Problem, out: Tensor) -> None:
    from tests.simt import conv_norm_act

    problem.call(conv_norm_act, out=out)


def run_gpu(problem: Problem, out: Tensor) -> None:
    """On copies in one allocation each, in which views keep what they share."""
    needs_gpu()
    storages: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else moved(tensor, "cuda", storages)

    with torch.inference_mode():
        run_front(problem.map(move), move(out))


Run = Callable[[Problem, Tensor], None]
RUNS: dict[str, Run] = {
    "front": run_front,
    "operator": run_operator,
    "fake": run_fake,
    "kernel_checks": run_kernel_checks,
    "simt": run_simulator,
}
WRITES = (run_front, run_operator, run_simulator)
"""The GPU writes too, but into a copy."""

runs = pytest.mark.parametrize(
    "run", [*RUNS.values(), pytest.param(run_gpu, marks=pytest.mark.gpu)], ids=[*RUNS, "cuda"]
)


def untouched(*size: int, **options: object) -> Tensor:
    return torch.full(size, UNTOUCHED, **options)


def strided(strides: tuple[int, ...], size: tuple[int, ...] = SIZE) -> Tensor:
    extent = 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    return untouched(extent).as_strided(size, strides)


WRONG: dict[str, tuple[Tensor, str]] = {
    "size": (untouched(2, 8, 5, 5), "the output's size [2, 8, 6, 5], but got out of size [2, 8, 5, 5]"),
    "channels": (untouched(2, 4, 6, 5), "the output's size [2, 8, 6, 5], but got out of size [2, 4, 6, 5]"),
    "batch": (untouched(1, 8, 6, 5), "the output's size [2, 8, 6, 5], but got out of size [1, 8, 6, 5]"),
    "dimensions": (untouched(8, 6, 5), "but got out of size [8, 6, 5]"),
    "empty": (untouched(0), "but got out of size [0]"),
    "dtype": (untouched(*SIZE, dtype=torch.float16), "out should have the output's dtype torch.float32"),
    "integers": (untouched(*SIZE, dtype=torch.int32), "out should have the output's dtype torch.float32"),
    "device": (torch.empty(SIZE, device="meta"), "but got out is on meta, different from other tensors on"),
    "one_image": (
        untouched(1, 8, 6, 5).expand(SIZE),
        "more than one element of the written-to tensor refers to a single memory location: out has size "
        "[2, 8, 6, 5] and strides [0, 30, 5, 1]. Give every element of out a place of its own",
    ),
    "one_channel": (untouched(2, 1, 6, 5).expand(SIZE), "refers to a single memory location"),
    "rows_too_near": (strided((240, 30, 4, 1)), "and strides [240, 30, 4, 1]. Give every element"),
    "channels_too_near": (strided((240, 1, 35, 7)), "and strides [240, 1, 35, 7]"),
    "same_strides": (strided((240, 30, 1, 1)), "and strides [240, 30, 1, 1]"),
    "not_nested": (strided((240, 3, 25, 8)), "refers to a single memory location"),
}


@runs
@pytest.mark.parametrize("name", WRONG)
def test_refused(run: Run, name: str) -> None:
    out, message = WRONG[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(BASE, out)
    if not out.is_meta:
        assert (out == UNTOUCHED).all()


@runs
@pytest.mark.parametrize("strides", [(240, 1, 40, 8), (1, 2, 16, 96), (8, 1, 90, 16), (3, 2, 100, 20)])
def test_strides_that_do_not_overlap_are_taken(run: Run, strides: tuple[int, ...]) -> None:
    out = strided(strides)
    run(BASE, out)
    if run in WRITES:
        assert_close_in_any_order(out, three_steps(BASE))
    else:
        assert (out == UNTOUCHED).all(), "what only checks writes nothing"


@runs
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_the_operator_refuses_is_refused_with_out_too(bad: object, run: Run) -> None:
    out = untouched(*SIZE)
    with pytest.raises(RuntimeError, match=re.escape(bad.wording)):
        run(bad.problem, out)
    assert (out == UNTOUCHED).all()


def overlapping() -> Iterator[tuple[str, Problem, Tensor, int]]:
    """An input's name, a problem, an out that shares elements with it, and the bytes between them."""
    problem = random_problem(
        ConvShape("square", 2, 8, 6, 5, 8, 3, 3, "x has the output's size", padding=(1, 1)),
        torch.float32,
        Wanted("relu", residual_order="add_act"),
    )
    yield "x", problem, problem.x, 0
    big = torch.full((2, 6, 5, 24), UNTOUCHED).permute(0, 3, 1, 2)
    yield "x", problem.replace(x=big[:, :8]), big[:, 7:15], 28
    yield "x", problem.replace(x=big[:, 7:15]), big[:, :8], -28
    yield "residual", problem.replace(residual=big[:, 4:12]), big[:, 8:16], 16
    whole = torch.full((480,), UNTOUCHED)
    yield "x", BASE.replace(x=whole[:240].view(2, 4, 6, 5)), whole.as_strided(SIZE, (1, 2, 16, 96)), 0
    residual = torch.full((2, 8, 6, 5), UNTOUCHED)
    yield "residual", problem.replace(residual=residual), residual.as_strided(SIZE, (1, 2, 16, 96)), 0
    for name in ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"):
        whole = torch.full((480 + 10,), UNTOUCHED)
        yield (
            name,
            problem.replace(**{name: whole[3:11]}),
            whole[10:490].as_strided(SIZE, (240, 30, 5, 1)),
            28,
        )
    whole = torch.full((576 + 479,), UNTOUCHED)
    weight = whole[479:].view(8, 8, 3, 3)
    yield "weight", problem.replace(weight=weight), whole[:480].view(SIZE), -479 * 4


OVERLAPPING = {f"{index}_{case[0]}": case[1:] for index, case in enumerate(overlapping())}


@runs
@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlap_is_refused(run: Run, name: str) -> None:
    problem, out, distance = OVERLAPPING[name]
    before, (_, input_name) = out.clone(), name.split("_", 1)
    with pytest.raises(RuntimeError, match="some elements of the input tensor") as caught:
        run(problem, out)
    given = getattr(problem, input_name)
    side = "before" if distance < 0 else "behind"
    hint = ", or pass out itself as residual" if input_name == "residual" else ""
    assert str(caught.value) == (
        f"unsupported operation: some elements of the input tensor {input_name} and the written-to tensor "
        f"refer to a single memory location: {input_name} has size {list(given.shape)} and strides "
        f"{list(given.stride())}, out starts {abs(distance)} bytes {side} it and has size {list(out.shape)} "
        f"and strides {list(out.stride())}. Please clone() {input_name} before performing the operation{hint}"
    )
    assert torch.equal(out, before)


def test_memory_known_under_two_storages_overlaps() -> None:
    x = torch.randn(2, 8, 6, 5)
    problem = Problem(x, torch.randn(8, 8, 1, 1))
    for run in (run_front, run_operator, run_kernel_checks):
        with pytest.raises(RuntimeError, match="input tensor x and the written-to tensor"):
            run(problem, torch.from_numpy(x.numpy()))


def hard_to_tell() -> tuple[Tensor, Tensor]:
    """Two views that share no element, one being at even and one at odd places, which the search misses."""
    whole = torch.zeros(2**16)
    return (
        whole.as_strided((9, 10, 11, 12), (202, 254, 326, 358)),
        whole.as_strided((9, 10, 11, 12), (2, 26, 334, 4102), 5001),
    )


def test_what_takes_too_long_to_find_out_is_refused() -> None:
    x, out = hard_to_tell()
    assert overlaps_itself(view_of(out)) is False
    assert overlaps(view_of(x), view_of(out)) is None
    problem = Problem(x, torch.ones(10, 10, 1, 1))
    messages = []
    for run in (run_front, run_operator, run_fake, run_kernel_checks):
        with pytest.raises(RuntimeError, match="and the written-to tensor may refer to a single") as caught:
            run(problem, out)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


def test_an_out_that_may_overlap_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_MOST_STEPS", 1)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor may refer to"):
        run_front(BASE, strided((3, 2, 100, 20)))


def view_of(tensor: Tensor) -> View:
    return View(4 * tensor.storage_offset(), 4, tensor.shape, tensor.stride())


def addresses(view: View) -> list[int]:
    return [
        view.start + byte + view.element_bytes * sum(i * s for i, s in zip(index, view.strides, strict=True))
        for index in itertools.product(*map(range, view.sizes))
        for byte in range(view.element_bytes)
    ]


small_views = st.builds(
    View,
    st.integers(0, 60),
    st.sampled_from([1, 2, 4]),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.tuples(*[st.integers(0, 12)] * 3),
)


@given(small_views)
def test_the_search_within_a_view_is_right(view: View) -> None:
    places = addresses(view)
    assert overlaps_itself(view) is (len(set(places)) < len(places))


@given(small_views, small_views)
@example(View(0, 2, (4, 3, 1), (6, 1, 0)), View(6, 2, (4, 3, 1), (6, 1, 0)))
@example(View(0, 4, (0, 3, 1), (6, 1, 0)), View(0, 4, (4, 3, 1), (6, 1, 0)))
def test_the_search_between_views_is_right(a: View, b: View) -> None:
    shared = not set(addresses(a)).isdisjoint(addresses(b))
    assert overlaps(a, b) is shared
    assert overlaps(b, a) is shared


def slices(sizes: tuple[int, ...]) -> st.SearchStrategy[tuple[slice, ...]]:
    """A window, with steps, of each dimension."""
    return st.tuples(
        *(
            st.builds(slice, st.integers(0, size - 1), st.integers(1, size), st.integers(1, 3))
            for size in sizes
        )
    )


@given(st.data(), st.permutations(range(4)))
def test_slices_of_one_large_tensor_are_told_apart(data: st.DataObject, order: list[int]) -> None:
    """As large as tensors are, where comparing all addresses would take forever."""
    sizes = (64, 256, 112, 112)
    big = torch.empty(sizes, device="meta").permute(order)
    one, other = (data.draw(slices(tuple(big.shape))) for _ in range(2))
    a, b = big[one], big[other]
    shared = all(
        set(range(size)[i]) & set(range(size)[j]) for size, i, j in zip(big.shape, one, other, strict=True)
    )
    found = overlaps(view_of(a), view_of(b))
    same_steps = all(i.step == j.step for i, j in zip(one, other, strict=True))
    assert found is shared or (found is None and not same_steps)


@given(st.data())
def test_the_kernels_checks_find_the_same(data: st.DataObject) -> None:
    if not hasattr(torch.ops.fused_cna, "_check_out"):
        pytest.skip(f"needs the compiled extension: {fused_cna.build_info()['reason']}")
    memory = torch.zeros(400)

    def draw(channels: int) -> Tensor:
        strides = data.draw(st.tuples(*[st.integers(0, 30)] * 4))
        return memory.as_strided((2, channels, 3, 2), strides, data.draw(st.integers(0, 150)))

    x, residual, out = draw(4), draw(3), draw(3)
    problem = Problem(
        x, torch.ones(3, 4, 1, 1), memory[397:], residual=data.draw(st.sampled_from([residual, out]))
    )

    def words(run: Run) -> str:
        try:
            run(problem, out)
        except RuntimeError as error:
            return str(error)
        return ""

    assert words(run_kernel_checks) == words(run_operator)
