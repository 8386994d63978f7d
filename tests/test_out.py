"""``out=``: results in memory of the caller's, such as a channel slice of a larger tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_cna
from fused_cna import ConvNormAct
from tests.conftest import Backend, needs_gpu
from tests.layouts import LAYOUTS, Layout, Surroundings, channels_last
from tests.reference import (
    DTYPES,
    Problem,
    Wanted,
    assert_close_in_any_order,
    expected_exactly,
    expected_rounded,
    integer_problem,
    library_bound,
    random_problem,
    relative_error,
    three_steps_error,
)
from tests.shapes import SHAPES, ConvShape, shape_named

operator = torch.ops.fused_cna.conv_norm_act_out

WRITABLE = [layout for layout in LAYOUTS if "expanded" not in layout.__name__]
layouts = pytest.mark.parametrize("layout", WRITABLE, ids=lambda layout: layout.__name__)

PROBLEM = random_problem(shape_named("groups_odd"), torch.float32, Wanted("silu", residual_order="add_act"))


def run_front(problem: Problem, out: Tensor) -> Tensor:
    return problem.call(fused_cna.conv_norm_act, out=out)


def run_operator(problem: Problem, out: Tensor) -> Tensor:
    assert operator(*problem.operator_arguments(), out) is None
    return out


run_both = pytest.mark.parametrize("run", [run_front, run_operator], ids=["front", "operator"])
Run = Callable[[Problem, Tensor], Tensor]


def channel_slice(like: Tensor, before: int = 5, behind: int = 3) -> Tensor:
    """A channel slice, of the size of `like`, of a larger channels_last tensor that is NaN."""
    n, k, p, q = like.shape
    big = torch.full((n, p, q, before + k + behind), torch.nan, dtype=like.dtype, device=like.device)
    return big.permute(0, 3, 1, 2)[:, before : before + k]


def result_of(problem: Problem) -> Tensor:
    return problem.call(fused_cna.conv_norm_act)


def test_schema() -> None:
    without = str(torch.ops.fused_cna.conv_norm_act.default._schema)
    with_out = without.replace("conv_norm_act(", "conv_norm_act_out(").replace(
        ") -> Tensor", ", Tensor(a!) out) -> ()"
    )
    assert str(operator.default._schema) == with_out


@run_both
@layouts
@pytest.mark.parametrize("name", ["groups_odd", "padding_asymmetric", "one_pixel", "one_channel"])
def test_any_layout(run: Run, name: str, layout: Layout) -> None:
    problem = random_problem(shape_named(name), torch.float32, Wanted("silu", residual_order="act_add"))
    expected = result_of(problem)
    out = layout(torch.zeros_like(expected))
    surroundings = Surroundings(out)
    before = problem.map(Tensor.clone)
    assert run(problem, out) is out
    assert torch.equal(out, expected)
    assert surroundings.are_untouched()
    for old, new in zip(before.operator_arguments(), problem.operator_arguments(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


@run_both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_slices(run: Run, shape: ConvShape) -> None:
    problem = random_problem(shape, torch.float16, Wanted("relu"))
    expected = result_of(problem)
    out = channel_slice(expected)
    surroundings = Surroundings(out)
    assert torch.equal(run(problem, out), expected)
    assert surroundings.are_untouched()


def dense_block(kernels: Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two layers that each add channels to what they read: concatenated, and written side by side."""
    width, growth = 16, (8, 24)
    first = ConvShape("first", 2, width, 7, 6, growth[0], 3, 3, "a layer", padding=(1, 1))
    second = ConvShape("second", 2, width + growth[0], 7, 6, growth[1], 1, 1, "the next layer")
    layers = [
        integer_problem(first, dtype, Wanted("relu", seed=1)),
        integer_problem(second, dtype, Wanted("relu", norm="none", seed=2)),
    ]
    x = layers[0].x
    concatenated = torch.cat([x, expected_rounded(layers[0]).clamp(max=7)], dim=1)
    layers[1] = layers[1].replace(x=concatenated)
    concatenated = torch.cat([concatenated, expected_rounded(layers[1])], dim=1)

    big = kernels.place(layers[0]).x.new_empty(2, 7, 6, width + sum(growth)).permute(0, 3, 1, 2)
    big[:, :width] = x
    done = width
    for layer in layers:
        out = big[:, done : done + layer.weight.shape[0]]
        kernels.run(kernels.place(layer).replace(x=big[:, :done]), out=out)
        if layer is layers[0]:
            out.clamp_(max=7)
        done += out.shape[1]
    return concatenated, big.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_block_without_concatenation(kernels: Backend, dtype: torch.dtype) -> None:
    expected, actual = dense_block(kernels, dtype)
    assert torch.equal(actual, expected)


@run_both
def test_other_slices_of_the_same_tensor_are_no_overlap(run: Run) -> None:
    big = torch.randn(2, 7, 6, 24).permute(0, 3, 1, 2)
    x, residual, out = big[:, :8], big[:, 8:14], big[:, 14:20]
    problem = Problem(x, torch.randn(6, 8, 1, 1), residual=residual)
    expected = result_of(problem)
    surroundings = Surroundings(out)
    assert torch.equal(run(problem, out), expected)
    assert surroundings.are_untouched()


@run_both
def test_a_residual_may_be_out_itself(run: Run) -> None:
    assert PROBLEM.residual is not None
    out = channel_slice(PROBLEM.residual).copy_(PROBLEM.residual)
    assert torch.equal(run(PROBLEM.replace(residual=out), out), result_of(PROBLEM))


def test_an_image_without_batch_dimension() -> None:
    assert PROBLEM.residual is not None
    single = PROBLEM.replace(x=PROBLEM.x[0], residual=PROBLEM.residual[0])
    out = channel_slice(PROBLEM.residual[:1])[0]
    assert run_front(single, out) is out
    assert_close_in_any_order(out, result_of(PROBLEM)[0])


@run_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(run: Run, dtype: torch.dtype) -> None:
    out = channel_slice(result_of(PROBLEM).to(dtype))
    with torch.autocast("cpu", dtype):
        run(PROBLEM, out)
        allowed = library_bound(dtype, three_steps_error(PROBLEM))
        with pytest.raises(RuntimeError, match=f"dtype {dtype}, .*autocast.*got out of dtype torch.float32"):
            run(PROBLEM, out.float())
    assert relative_error(out, expected_exactly(PROBLEM)) <= allowed


@run_both
@pytest.mark.parametrize("name", ["x", "weight", "bias", "norm_weight", "norm_bias", "residual", "out"])
def test_no_gradient_flows(run: Run, name: str) -> None:
    expected = result_of(PROBLEM)
    out = torch.full_like(expected, 7.0)
    problem = PROBLEM
    if name == "out":
        out.requires_grad_()
    else:
        problem = PROBLEM.replace(**{name: getattr(PROBLEM, name).clone().requires_grad_()})
    with pytest.raises(RuntimeError, match="arguments don't support automatic differentiation"):
        run(problem, out)
    assert torch.equal(out, torch.full_like(expected, 7.0))
    with torch.no_grad():
        assert torch.equal(run(problem, out), expected)
    with torch.inference_mode():
        assert torch.equal(run(problem, out.detach().zero_()), expected)


@run_both
def test_no_tangent_flows(run: Run) -> None:
    out = torch.empty_like(result_of(PROBLEM))
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        torch.func.jvp(lambda x: run(PROBLEM.replace(x=x), out), (PROBLEM.x,), (PROBLEM.x,))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(run(PROBLEM, out), result_of(PROBLEM))


@run_both
def test_autograd_knows_that_the_memory_changed(run: Run) -> None:
    out = channel_slice(result_of(PROBLEM)).zero_()
    factor = torch.ones_like(out, requires_grad=True)
    product = (factor * out).sum()
    with torch.no_grad():
        run(PROBLEM, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@run_both
def test_inference_tensors(run: Run) -> None:
    with torch.inference_mode():
        out = torch.empty_like(result_of(PROBLEM))
        assert torch.equal(run(PROBLEM, out), result_of(PROBLEM))
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        run(PROBLEM, out)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Softplus, None], ids=["relu", "softplus", "no_act"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm, None], ids=["batch", "instance", "no_norm"])
@pytest.mark.parametrize("order", [None, "add_act", "act_add"])
def test_modules(device: str, order: str | None, norm: object, act: object, train: bool) -> None:
    module = ConvNormAct(4, 6, norm=norm, act=act, residual_order=order or "add_act").to(device).train(train)
    x = torch.randn(2, 4, 7, 5, device=device)
    residual = None if order is None else torch.randn(2, 6, 7, 5, device=device)
    with torch.no_grad():
        expected = module(x, residual)
        out = channel_slice(expected)
        surroundings = Surroundings(out)
        assert module(x, residual, out=out) is out
        assert torch.equal(out, expected)
        assert surroundings.are_untouched()
        if residual is not None:
            assert torch.equal(module(x, residual, out=residual), expected)
        if not train:
            single = out[0].clone()
            assert module.eval()(x[0], out=single) is single
            torch.testing.assert_close(single, module(x)[0])


def test_modules_with_hooks() -> None:
    module = ConvNormAct(4, 6).eval()
    module.act.register_forward_hook(lambda *_: torch.full((2, 6, 7, 5), 3.0))
    out = torch.zeros(2, 6, 7, 5)
    with torch.no_grad():
        assert module(torch.randn(2, 4, 7, 5), out=out) is out
    assert torch.equal(out, torch.full((2, 6, 7, 5), 3.0))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Softplus], ids=["fused", "not_fused"])
def test_what_modules_refuse(act: type[nn.Module], train: bool) -> None:
    module, x = ConvNormAct(6, 6, act=act).train(train), torch.randn(2, 6, 7, 5)
    out = torch.full((2, 6, 7, 5), 7.0)
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        module(x, out=out)
    with torch.no_grad():
        for bad, message in (
            (
                out[:1],
                r"out should have the output's size \[2, 6, 7, 5\], but got out of size \[1, 6, 7, 5\]",
            ),
            (out.double(), r"out should have the output's dtype torch.float32, .*torch.float64"),
            (x, "some elements of the input tensor x and the written-to tensor refer to a single memory"),
            (out[:, :1].expand(2, 6, 7, 5), "more than one element of the written-to tensor refers to"),
        ):
            with pytest.raises(RuntimeError, match=message):
                module(x, out=bad)
        with pytest.raises(RuntimeError, match="the input tensor residual and the written-to tensor refer"):
            module(x, torch.as_strided(out, (2, 6, 7, 5), (1, 2, 12, 84)), out=out)
        with pytest.raises(TypeError, match="out must be a Tensor or None, but got int"):
            module(x, out=3)
    assert torch.equal(out, torch.full((2, 6, 7, 5), 7.0))


def test_the_front_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="out must be a Tensor or None, but got list"):
        fused_cna.conv_norm_act(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 1, 1), out=[1.0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_writes_into_the_slice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    problem = integer_problem(shape_named("many_blocks"), dtype, Wanted("relu"))
    placed = problem.replace(x=channels_last(problem.x)).map(Tensor.cuda)
    out = channel_slice(expected_rounded(problem).cuda())
    surroundings = Surroundings(out)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        run_front(placed, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_front(placed, out)
        out.zero_()
        graph.replay()
    assert torch.equal(out.cpu(), expected_rounded(problem))
    assert surroundings.are_untouched()


def test_the_example_of_the_readme() -> None:
    """A dense block as users write it, against torch.cat."""
    n, h, w = 2, 6, 5
    x = torch.randn(n, 64, h, w, dtype=torch.float64)
    layers = [ConvNormAct(64 + 32 * i, 32).eval().double() for i in range(4)]
    with torch.inference_mode():
        big = torch.empty(n, 64 + 4 * 32, h, w, dtype=x.dtype).to(memory_format=torch.channels_last)
        big[:, :64] = x
        for i, layer in enumerate(layers):
            done = 64 + 32 * i
            layer(big[:, :done], out=big[:, done : done + 32])
        expected = x
        for layer in layers:
            expected = torch.cat([expected, F.relu(layer.norm(layer.conv(expected)))], dim=1)
    torch.testing.assert_close(big, expected)
