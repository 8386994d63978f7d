"""What is refused, where: the front, the operator, fake tensors and the kernels' own checks, all alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from fused_cna import ConvNormAct
from tests.bad_inputs import BAD, BASE, Bad, ones
from tests.conftest import needs_gpu
from tests.reference import Problem

operator = torch.ops.fused_cna.conv_norm_act


def run_front(problem: Problem) -> Tensor:
    return problem.call(fused_cna.conv_norm_act)


def run_operator(problem: Problem) -> Tensor:
    return operator(*problem.operator_arguments())


def run_fake(problem: Problem) -> Tensor:
    with FakeTensorMode() as mode:
        return operator(*problem.map(mode.from_tensor).operator_arguments())


def run_meta(problem: Problem) -> Tensor:
    def to_meta(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            pytest.skip("everything is on the same device here")
        return tensor.to("meta")

    return operator(*problem.map(to_meta).operator_arguments())


def run_kernel_checks(problem: Problem) -> Tensor:
    if not hasattr(torch.ops.fused_cna, "_checked_output"):
        pytest.skip(f"needs the compiled extension: {fused_cna.build_info()['reason']}")
    return torch.ops.fused_cna._checked_output(*problem.operator_arguments())


def run_simulator(problem: Problem) -> Tensor:
    from tests.simt import conv_norm_act

    return problem.call(conv_norm_act)


def run_gpu(problem: Problem) -> Tensor:
    needs_gpu()
    return run_front(problem.map(lambda tensor: tensor if tensor.is_meta else tensor.cuda()))


RUNS: dict[str, Callable[[Problem], Tensor]] = {
    "front": run_front,
    "operator": run_operator,
    "fake": run_fake,
    "meta": run_meta,
    "kernel_checks": run_kernel_checks,
    "simt": run_simulator,
}
runs = pytest.mark.parametrize(
    "run", [*RUNS.values(), pytest.param(run_gpu, marks=pytest.mark.gpu)], ids=[*RUNS, "cuda"]
)


@runs
def test_the_base_is_good(run: Callable[[Problem], Tensor]) -> None:
    assert tuple(run(BASE).shape) == (2, 8, 6, 5)


@runs
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refused(bad: Bad, run: Callable[[Problem], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(bad.wording)) as caught:
        run(bad.problem)
    message = str(caught.value)
    for number in bad.numbers:
        assert str(number).lower() in message.lower(), f"{number!r} is not in: {message}"


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.like_torch], ids=str)
def test_torch_refuses_it_in_the_same_words(bad: Bad) -> None:
    p = bad.problem
    with pytest.raises(RuntimeError, match=re.escape(bad.wording)) as theirs:
        torch.conv2d(p.x, p.weight, p.bias, p.stride, p.padding, p.dilation, p.groups)
    if "should be the same" in bad.wording:
        return  # the names of types differ from device to device, so only these words are compared
    wording, _, _ = str(theirs.value).partition(", but got")
    with pytest.raises(RuntimeError) as ours:
        run_front(p)
    assert str(ours.value).startswith(wording)


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.like_torch], ids=str)
def test_refused_without_a_norm_too(bad: Bad) -> None:
    bare = Problem(
        **{"x": BASE.x, "weight": BASE.weight, "bias": BASE.bias, "padding": (1, 1), "groups": 2}
        | bad.changes
    )
    with pytest.raises(RuntimeError, match=re.escape(bad.wording)):
        run_front(bare)


def test_refused_where_a_gradient_is_wanted() -> None:
    for bad in BAD:
        problem = bad.problem
        problem = problem.replace(
            norm_bias=None if problem.norm_bias is None else problem.norm_bias.clone().requires_grad_()
        )
        problem = problem.replace(x=problem.x.clone().requires_grad_())
        for run in (run_front, run_operator):
            with pytest.raises(RuntimeError, match=re.escape(bad.wording)):
                run(problem)


@pytest.mark.parametrize(
    ("changes", "error", "wording"),
    [
        (
            {"padding": "same", "stride": 2},
            RuntimeError,
            "padding='same' is not supported for strided convolutions",
        ),
        ({"padding": "full"}, RuntimeError, "Invalid padding string: 'full'"),
        ({"padding": 1.5}, TypeError, "padding.*1.5"),
        ({"stride": "2"}, TypeError, "stride.*2"),
        ({"dilation": (1, 1.5)}, TypeError, "dilation.*1.5"),
        ({"stride": -1}, RuntimeError, "non-positive stride is not supported"),
        ({"stride": ()}, RuntimeError, "expected stride to be a single integer value or a list of 2"),
        ({"padding": (1, 2, 3)}, RuntimeError, "expected padding .*[1, 2, 3]"),
        ({"weight": None}, TypeError, "weight"),
        ({"x": [[1.0]]}, TypeError, "x"),
        ({"bias": 3.0}, TypeError, "bias"),
        ({"running_mean": [0.0] * 8}, TypeError, "running_mean"),
    ],
    ids=str,
)
def test_refused_by_the_front(changes: dict[str, Any], error: type[Exception], wording: str) -> None:
    with pytest.raises(error, match=wording):
        run_front(BASE.replace(residual=None, **changes))


@pytest.mark.parametrize("size", [(8, 6, 5), (1, 8, 6, 5), (8, 6, 4)])
def test_the_residual_of_an_unbatched_image_is_unbatched(size: tuple[int, ...]) -> None:
    problem = BASE.replace(x=BASE.x[0], residual=ones(*size))
    if size == (8, 6, 5):
        assert run_front(problem).shape == (8, 6, 5)
        return
    with pytest.raises(RuntimeError, match="residual"):
        run_front(problem)


def test_boolean_images_are_refused() -> None:
    problem = Problem(ones(1, 2, 5, 5, dtype=torch.bool), ones(3, 2, 3, 3, dtype=torch.bool))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.conv2d(problem.x, problem.weight)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_front(problem)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "numbers"),
    [
        ((5, 6, 3, 1, None, 1, 2), {}, ValueError, ("in_channels", "5", "2")),
        ((4, 7, 3, 1, None, 1, 2), {}, ValueError, ("out_channels", "7", "2")),
        ((4, 6), {"groups": 0}, ValueError, ("groups", "0")),
        ((4, 6), {"padding": "full"}, ValueError, ("full",)),
        ((4, 6), {"norm": nn.BatchNorm2d(6)}, TypeError, ("norm", "BatchNorm2d")),
        ((4, 6), {"act": nn.ReLU()}, TypeError, ("act", "ReLU")),
        ((4, 6), {"act": "relu"}, TypeError, ("act", "relu")),
        ((4, 6), {"norm": lambda channels: None}, TypeError, ("norm", "None")),
        ((4, 6), {"padding": "same", "stride": 2}, ValueError, ("same",)),
        ((4, 6), {"padding_mode": "mirror"}, ValueError, ("mirror",)),
        ((4, 6), {"residual_order": "before"}, (ValueError, RuntimeError), ("before", "add_act", "act_add")),
    ],
)
def test_refused_by_the_module(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], numbers: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        ConvNormAct(*arguments, **options)
    for number in numbers:
        assert number in str(caught.value)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Softplus])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, None])
@pytest.mark.parametrize(
    ("residual", "numbers"),
    [
        (ones(2, 6, 1, 1), ("[2, 6, 1, 1]", "[2, 6, 5, 5]")),
        (ones(6, 5, 5), ("[6, 5, 5]",)),
        (ones(2, 6, 5, 4), ("[2, 6, 5, 4]", "[2, 6, 5, 5]")),
        (ones(2, 6, 5, 5, dtype=torch.float64), ("float64", "float32")),
    ],
    ids=["broadcast", "unbatched", "size", "dtype"],
)
def test_residuals_refused_by_the_module(
    norm: Any, act: Any, train: bool, residual: Tensor, numbers: tuple[str, ...]
) -> None:
    """In every mode and whatever is fused, so that training does not hide what inference would refuse."""
    module = ConvNormAct(4, 6, norm=norm, act=act).train(train)
    with pytest.raises(RuntimeError, match="residual") as caught:
        module(ones(2, 4, 5, 5), residual)
    for number in numbers:
        assert number in str(caught.value)


def test_modules_refused_by_from_modules() -> None:
    for modules in ((nn.Linear(4, 6),), (nn.Conv1d(4, 6, 3),), (nn.ConvTranspose2d(4, 6, 3),)):
        with pytest.raises(TypeError, match=type(modules[0]).__name__):
            ConvNormAct.from_modules(*modules)
    for name, value in (("norm", nn.BatchNorm2d), ("act", nn.ReLU), ("act", "relu")):
        with pytest.raises(TypeError, match=name):
            ConvNormAct.from_modules(nn.Conv2d(4, 6, 3), **{name: value})


def test_images_refused_by_the_module() -> None:
    module, plain = ConvNormAct(4, 6).eval(), nn.Conv2d(4, 6, 3)
    for x in (ones(2, 5, 6, 6), ones(4, 6), ones(2, 4, 6, 6, dtype=torch.float64), ones(1, 1, 4, 6, 6)):
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as ours:
            module(x)
        assert str(theirs.value).split(" and ")[0] in str(ours.value)
