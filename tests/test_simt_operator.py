"""The operator on the simulator: its front, the plans it takes, its checks, and the sanitizers."""

from __future__ import annotations

import ctypes
import inspect

import pytest
import torch

import fused_cna
from tests.layouts import channel_slice
from tests.reference import DTYPES, Wanted, expected_rounded, integer_problem
from tests.shapes import SHAPES, ConvShape
from tests.simt import SimulatorError, binding, conv, conv_norm_act, list_plans

SEEDS = range(8)
SHAPE = next(shape for shape in SHAPES if shape.name == "odd_channels")
DENSE = next(shape for shape in SHAPES if shape.name == "3x3")
FULL = Wanted(act="silu", residual_order="add_act")


def test_the_front_has_the_signature_of_the_real_one() -> None:
    real = inspect.signature(fused_cna.conv_norm_act).parameters
    simulated = inspect.signature(conv_norm_act).parameters
    assert list(simulated) == [
        *real,
        *("plan", "device", "allow_tf32", "seed", "starts_early", "sanitized"),
    ]
    for name, parameter in real.items():
        assert (simulated[name].kind, simulated[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("short", ["x", "weight", "residual", "bias", "running_var", "y"])
def test_sanitizers_see_one_element_too_far(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = integer_problem(SHAPE, torch.float16, FULL)
    given = ("x", "weight", "residual", *binding.VECTORS, "y")
    run = binding.run_conv_sanitized

    def run_on_less_memory(call: binding.ConvCall, memory: list[tuple[int, int]]) -> bytes:
        return run(
            call, [(a, size - 2 * (name == short)) for name, (a, size) in zip(given, memory, strict=True)]
        )

    monkeypatch.setattr(conv.binding, "run_conv_sanitized", run_on_less_memory)
    with pytest.raises(SimulatorError, match="AddressSanitizer: heap-buffer-overflow"):
        problem.call(conv_norm_act, sanitized=True)


def plans_run(monkeypatch: pytest.MonkeyPatch) -> list[binding.Plan]:
    """The plans of all calls from now on."""
    plans: list[binding.Plan] = []
    find = binding.plan_conv

    def note(call: binding.ConvCall) -> binding.Plan:
        plans.append(find(call))
        return plans[-1]

    monkeypatch.setattr(conv.binding, "plan_conv", note)
    return plans


def test_a_given_plan_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_run(monkeypatch)
    problem = integer_problem(DENSE, torch.float16)
    for plan in ("direct", "direct 128x8x32", "implicit_gemm_sm80 64x64x32 split 1 plain"):
        assert torch.equal(problem.call(conv_norm_act, plan=plan), expected_rounded(problem))
    assert plans[0].text.startswith("direct ")
    assert plans[1].text == "direct 128x8x32"
    assert plans[2].text.startswith("implicit_gemm_sm80 64x64x32 split 1 plain ")


def test_operands_are_copied_where_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_run(monkeypatch)
    problem = integer_problem(DENSE, torch.float16)
    channels_last = problem.replace(
        x=problem.x.contiguous(memory_format=torch.channels_last),
        weight=problem.weight.contiguous(memory_format=torch.channels_last),
    )
    for given in (
        problem,
        problem.replace(x=channels_last.x),
        problem.replace(weight=channels_last.weight),
        channels_last,
    ):
        result = given.call(conv_norm_act, plan="implicit_gemm_sm80")
        assert torch.equal(result, expected_rounded(problem))
        assert torch.equal(given.call(conv_norm_act, plan=plans[-1].text, sanitized=True), result)
    copies = [(plan.convert_x, plan.convert_weight) for plan in plans[::2]]
    assert copies == [(True, True), (False, True), (True, False), (False, False)]


def test_the_device_and_tf32_decide_what_may_run() -> None:
    problem = integer_problem(DENSE, torch.float32)

    def plans(**extra: object) -> list[str]:
        return list_plans(problem.x, problem.weight, padding=DENSE.padding, **extra)

    assert not any(name.startswith("implicit_gemm_sm80") for name in plans())
    assert any(name.startswith("implicit_gemm_sm80 256x128x16") for name in plans(allow_tf32=True))
    # it does not fit the 99 KB of a block there
    assert not any(" 128x128x32" in name for name in plans(allow_tf32=True, device="L4"))
    with pytest.raises(RuntimeError, match=r"no device is called 'TPU'; known are A100, .*H100"):
        plans(device="TPU")


@pytest.mark.parametrize("plan", ["winograd", "direct 1x2x3", "direct 64x64", "implicit_gemm_sm80"])
def test_a_plan_that_does_not_exist_is_refused(plan: str) -> None:
    with pytest.raises(RuntimeError, match=f'no plan "{plan}" for float32 .*"direct 64x64x32"'):
        integer_problem(SHAPE, torch.float32).call(conv_norm_act, plan=plan)


def test_an_input_without_batch_dimension_gives_such_an_output() -> None:
    problem = integer_problem(SHAPE, torch.float32)
    one = problem.replace(x=problem.x[0])
    expected = problem.replace(x=problem.x[:1]).call(conv_norm_act)[0]
    assert torch.equal(one.call(conv_norm_act), expected)
    out = channel_slice(expected[None])[0]
    assert one.call(conv_norm_act, out=out.zero_()) is out
    assert torch.equal(out, expected)


def test_what_cannot_be_simulated_is_refused() -> None:
    problem = integer_problem(SHAPE, torch.float32)
    with pytest.raises(
        RuntimeError, match=r"float32, torch\.float16, torch\.bfloat16, but x is torch\.float64"
    ):
        problem.map(torch.Tensor.double).call(conv_norm_act)
    with pytest.raises(RuntimeError, match="runs on the CPU's memory, but x is on meta"):
        problem.map(lambda tensor: tensor.to("meta")).call(conv_norm_act)


@pytest.mark.parametrize("misalignment", [0, 2, 6, 8])
def test_the_kernel_sees_the_alignment_of_out(misalignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    run = binding.run_conv
    monkeypatch.setattr(conv.binding, "run_conv", lambda call: (addresses.append(call.y.data), run(call))[1])
    problem = integer_problem(DENSE, torch.float16)
    memory = torch.zeros(8 * 8 * 8 + 8, dtype=torch.float16)
    out = memory[misalignment // 2 :][: 8 * 8 * 8].view(1, 8, 8, 8)
    problem.call(conv_norm_act, out=out)
    assert torch.equal(out, expected_rounded(problem))
    assert addresses[0] % 16 == out.data_ptr() % 16 == misalignment


OUTSIDE = r"wrote {} elements outside its output of \d+: the first at {} from its "


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 5), (8, 5)], None),
        (
            [(0, 5), (8, 4)],
            r"left 1 of 10 output elements unwritten, the first at \[n, k, p, q\] = \[0, 4, 0, 1",
        ),
        ([(0, 5), (8, 6)], OUTSIDE.format(1, 0) + "end"),
        ([(-2, 7), (8, 5)], OUTSIDE.format(2, -2) + "start$"),
        ([(0, 5), (8, 5), (6, 1)], OUTSIDE.format(1, 6) + "start, between its el"),
        ([(0, 5), (8, 5), (4, 4)], OUTSIDE.format(3, 5) + "start, between its el"),
    ],
)
def test_the_output_is_checked(
    dtype: torch.dtype, spans: list[tuple[int, int]], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that writes spans of elements of a slice: two pixels of 5 channels in 8."""

    def write(call: binding.ConvCall) -> None:
        for first, count in spans:
            ctypes.memset(call.y.data + first * dtype.itemsize, 0, count * dtype.itemsize)

    monkeypatch.setattr(conv.binding, "run_conv", write)
    problem = integer_problem(ConvShape("five", 1, 2, 1, 2, 5, 1, 1, "two pixels of 5 channels"), dtype)
    out = channel_slice(torch.ones(1, 5, 1, 2, dtype=dtype), 1, 2)
    if message is None:
        assert torch.count_nonzero(problem.call(conv_norm_act, out=out)) == 0
    else:
        with pytest.raises(SimulatorError, match=message):
            problem.call(conv_norm_act, out=out)
