"""What is special to the Hopper kernel: maps and what goes without, clusters, when the plan takes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_cna import ConvProblem, _extension, explain
from fused_cna.plan import planner
from tests.conformance import Subject, bits
from tests.conftest import Backend, Gpu, Simulator, needs_gpu
from tests.families import BY_NAME, family_shape, laid_out
from tests.hopper_page import NETWORKS, of_network
from tests.layouts import channels_last, contiguous
from tests.reference import DTYPES, Problem, Wanted, expected_rounded, integer_problem, random_problem
from tests.shapes import SHAPES, ConvShape, table
from tests.simt import conv_norm_act
from tests.simt.binding import failing_encode

HOPPER = BY_NAME["implicit_gemm_sm90"]

WHOLE = "H100"
"""Its 132 multiprocessors leave room for clusters of 8, those of HOPPER.device do not."""


def dense(shape: ConvShape, dtype: torch.dtype, wanted: Wanted | None = None) -> Problem:
    wanted = wanted or Wanted("relu", residual_order="add_act")
    return laid_out(integer_problem(shape, dtype, wanted), channels_last)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}")
        for dtype in DTYPES
        for shape in (*SHAPES, *HOPPER.shapes)
        if shape.n > 0 and HOPPER.takes(shape, dtype)
    ],
)
def test_maps_and_the_gather_bring_the_same(shape: ConvShape, dtype: torch.dtype) -> None:
    """Bit for bit on any inputs, because the same products follow; where channels allow maps."""
    subject = Subject(Simulator(), HOPPER, shape, dtype)
    problem = laid_out(random_problem(shape, dtype, Wanted("silu")), channels_last)
    plans = subject.plans(problem)
    pairs = [
        (plan, plan.replace(fetch, "gather"))
        for plan in plans
        for fetch in ("im2col", "tiled")
        if fetch in plan and plan.replace(fetch, "gather") in plans
    ]
    assert pairs or problem.x.shape[1] * dtype.itemsize % 16 or "gather" in plans[0]
    for mapped, gathered in subject.chance.sample(pairs, min(len(pairs), 2)):
        assert torch.equal(bits(subject.run(problem, mapped)), bits(subject.run(problem, gathered))), mapped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["late_layer", "deep_pointwise"])
def test_every_cluster_is_exact_and_repeats(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    """Whatever the order of the blocks of a cluster."""
    subject = Subject(kernels, HOPPER, name, dtype)
    shape = family_shape(HOPPER.name, name)
    plans = HOPPER.plans(dense(shape, dtype), kernels.planned_for(WHOLE))
    by_split = {size: [plan for plan in plans if f" split {size} " in plan] for size in range(2, 9)}
    assert all(by_split[size] for size in (range(2, 9) if name == "late_layer" else (2,)))
    chosen = [plan for some in by_split.values() for plan in subject.chance.sample(some, min(len(some), 3))]
    for act in ("relu", "leaky_relu"):  # in registers, and in turns
        wanted = Wanted(act, (0.125,) if act == "leaky_relu" else (), residual_order="act_add")
        subject.check(dense(shape, dtype, wanted), chosen, **kernels.on(WHOLE))
    problem = laid_out(random_problem(shape, dtype, Wanted("gelu")), channels_last)
    for plan in chosen[::3]:
        first, *others = (
            bits(subject.run(problem, plan, **kernels.on(WHOLE), **kernels.thread_order(seed)))
            for seed in range(3)
        )
        assert all(torch.equal(first, other) for other in others), plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["many_tiles", "rows_and_columns", "images_in_tile", "wide_groups"])
def test_a_residual_that_a_map_brings(kernels: Backend, name: str, dtype: torch.dtype) -> None:
    """By every tile, to registers and in turns, for outputs with a map and without one."""
    subject = Subject(kernels, HOPPER, name, dtype)
    shape = family_shape(HOPPER.name, name)
    for order, act, layout in (("add_act", "relu", channels_last), ("act_add", "leaky_relu", contiguous)):
        wanted = Wanted(act, (0.125,) if act == "leaky_relu" else (), residual_order=order)
        problem = dense(shape, dtype, wanted)
        assert problem.residual is not None
        problem = problem.replace(residual=channels_last(problem.residual))
        out = layout(torch.empty_like(expected_rounded(problem)))
        plans = HOPPER.some(subject.plans(problem), subject.chance)
        subject.check(problem, plans, out=kernels.place(problem.replace(residual=out)).residual)


@pytest.mark.parametrize("name", ["many_tiles", "rows_and_columns", "late_layer"])
def test_what_the_driver_will_not_encode_is_gathered(name: str) -> None:
    """By every tile, and by another one in the place of a tile that has no gather."""
    problem = dense(family_shape(HOPPER.name, name), torch.float16)
    plans = [plan for plan in HOPPER.plans(problem, HOPPER.device) if " gather " not in plan]
    assert any(" 256x128x64 " in plan for plan in plans)
    with failing_encode():
        Subject(Simulator(), HOPPER, name).check(problem, plans)


def test_maps_are_told_apart_by_their_addresses() -> None:
    """From two threads, in more places than maps are kept."""
    (shape,) = table("pixel | 1x64x1x1 32x1x1 | as little as there is")
    problem = dense(shape, torch.float16)
    assert problem.residual is not None
    places, step = 1500, 64
    memory = torch.randint(-3, 4, (3, places * step), generator=torch.Generator().manual_seed(0)).half()

    def is_right(i: int) -> bool:
        x, residual, y = memory[:, i * step : (i + 1) * step]
        given = problem.replace(x=x.view(1, 64, 1, 1), residual=residual[:32].view(1, 32, 1, 1))
        expected = expected_rounded(given)
        out = y[:32].view(1, 32, 1, 1)
        given.call(conv_norm_act, out=out, plan=f"{HOPPER.name} 64x64x64 single tiled split 1")
        return torch.equal(out, expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(is_right, range(places)))


LAYER = ConvProblem(32, 256, 14, 14, 256, 3, 3, padding=1)


def test_a_driver_without_maps_leaves_the_gather() -> None:
    device = planner().device("H100") | {"has_tensor_maps": False}
    for problem in (LAYER, ConvProblem(32, 256, 14, 14, 1024, 1, 1)):
        candidates = planner().candidates(planner().problem(problem.question()), device)
        ours = [c for c in candidates if c["kernel"] == HOPPER.name]
        assert {c["rows"] for c in ours if not c["illegal"]} == {"gather"}
        assert {c["illegal"] for c in ours if c["rows"] != "gather"} == {
            "the driver does not encode tensor maps"
        }


@pytest.mark.parametrize("device", ["A100", "L4", "RTX 4090", "B200"])
def test_other_devices_are_told_why_not(device: str) -> None:
    reasons = {c["illegal"] for c in explain(LAYER, device=device).candidates if c["kernel"] == HOPPER.name}
    assert len(reasons) == 1
    assert "it is for compute capability 9.0, the device has " in reasons.pop()


def test_a_part_of_a_device_is_planned_for() -> None:
    """As MIG gives: persistent blocks are no more than there are multiprocessors."""
    for device, multiprocessors in (("H100/16", 16), ("H100", 132)):
        assert explain(LAYER, device=device).candidates[0]["blocks"] <= 2 * multiprocessors
        assert planner().device(device)["multiprocessors"] == multiprocessors
    for wrong in ("H100/0", "H100/133", "H100/x", "H100/"):
        with pytest.raises(ValueError, match="1 to 132 multiprocessors"):
            explain(LAYER, device=wrong)


def test_the_page_on_its_choice_is_what_the_plan_says() -> None:
    """docs/hopper.md is written by tests/hopper_page.py; where estimates change, it is to be written anew."""
    page = Path(__file__).resolve().parents[1].joinpath("docs", "hopper.md").read_text()
    for name in NETWORKS:
        assert "\n".join(of_network(name)) in page, "python -m tests.hopper_page > docs/hopper.md"


def test_an_explanation_says_what_the_driver_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = SimpleNamespace(refused_tensor_maps=lambda: (3, "the driver refused to encode a tensor map"))
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    monkeypatch.setattr(_extension, "module", lambda: refused)
    assert any("refused to encode a tensor map (3 times)" in note for note in explain(LAYER).notes)
    assert not explain(LAYER, device="A100").notes


@pytest.mark.gpu
def test_the_driver_takes_the_maps_that_the_plan_asks_for() -> None:
    """A map that is refused costs no result, and would go unseen."""
    needs_gpu()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("tensor maps are for compute capability 9.0")
    before = _extension.module().refused_tensor_maps()
    for shape in HOPPER.shapes:
        problem = dense(shape, torch.float16)
        for plan in HOPPER.plans(problem)[:2]:
            Subject(Gpu(), HOPPER, shape).check(problem, [plan])
    assert _extension.module().refused_tensor_maps() == before
