"""The operator under torch's machinery: opcheck, fake tensors, torch.compile, torch.export, vmap."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from tests.layouts import LAYOUTS, Layout, odd_unit_strides
from tests.reference import TENSORS, Problem, Wanted, integer_problem, random_problem
from tests.shapes import SHAPES, TELLING_SHAPES, ConvShape, shape_named

operator = torch.ops.fused_cna.conv_norm_act

PROBLEMS = {
    "plain": random_problem(shape_named("3x3"), torch.float32, Wanted(norm="none", bias=False)),
    "bias": random_problem(shape_named("1x1_stride2"), torch.float32, Wanted("relu", norm="none")),
    "add_act": random_problem(
        shape_named("groups_odd"), torch.float32, Wanted("leaky_relu", (0.1,), residual_order="add_act")
    ),
    "act_add": random_problem(
        shape_named("3x3_stride2"),
        torch.float64,
        Wanted("silu", residual_order="act_add", norm_dtype=torch.float64),
    ),
    "four_pads": random_problem(
        shape_named("padding_asymmetric"), torch.float32, Wanted("gelu", norm="no_affine")
    ),
    "bfloat16": random_problem(
        shape_named("depthwise_twice"), torch.bfloat16, Wanted("relu6", norm="only_bias")
    ),
    "one_pixel": random_problem(
        shape_named("one_pixel"), torch.float32, Wanted("elu", (1.0,), norm="only_weight")
    ),
    "empty": random_problem(
        shape_named("empty_batch"), torch.float32, Wanted("relu", residual_order="add_act")
    ),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)

run_both = pytest.mark.parametrize(
    "run",
    [
        lambda problem: problem.call(fused_cna.conv_norm_act),
        lambda problem: operator(*problem.operator_arguments()),
    ],
    ids=["front", "operator"],
)


def with_gradients(problem: Problem) -> Problem:
    names = [
        n for n in TENSORS if getattr(problem, n) is not None and n not in ("running_mean", "running_var")
    ]
    return problem.replace(**{name: getattr(problem, name).clone().requires_grad_() for name in names})


@problems
def test_opcheck(problem: Problem) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    torch.library.opcheck(operator, problem.operator_arguments())


@pytest.mark.parametrize("name", ["plain", "add_act", "act_add", "four_pads"])
def test_opcheck_with_gradients(name: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    torch.library.opcheck(operator, with_gradients(PROBLEMS[name]).operator_arguments())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "expanded" not in layout.__name__])
def test_opcheck_in_other_layouts(layout: Layout) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    problem = PROBLEMS["add_act"].map(lambda tensor: layout(tensor) if tensor.dim() == 4 else tensor)
    torch.library.opcheck(
        operator, problem.operator_arguments(), test_utils=("test_schema", "test_faketensor")
    )


def fake_result(problem: Problem) -> Tensor:
    with FakeTensorMode() as mode:
        return operator(*problem.map(mode.from_tensor).operator_arguments())


def assert_same_layout(actual: Tensor, expected: Tensor, about: object) -> None:
    assert actual.shape == expected.shape, about
    assert actual.dtype == expected.dtype, about
    assert actual.device == expected.device, about
    assert actual.stride() == expected.stride(), about


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_tensors_have_the_output_size(shape: ConvShape) -> None:
    problem = integer_problem(shape, torch.float16, Wanted("relu", residual_order="add_act"))
    assert_same_layout(fake_result(problem), operator(*problem.operator_arguments()), shape)
    meta = operator(*problem.map(lambda tensor: tensor.to("meta")).operator_arguments())
    assert meta.is_meta
    assert tuple(meta.shape) == shape.output_size


def many_layouts(problem: Problem) -> list[tuple[str, Problem]]:
    found = [
        (
            f"x {x_layout.__name__}, weight {weight_layout.__name__}",
            problem.replace(x=x_layout(problem.x), weight=weight_layout(problem.weight)),
        )
        for x_layout, weight_layout in itertools.product(LAYOUTS, LAYOUTS)
    ]
    formats = (torch.contiguous_format, torch.channels_last)
    for stride, memory_format in itertools.product((0, 1, 5, 1000), formats):
        x = odd_unit_strides(problem.x.contiguous(memory_format=memory_format), stride)
        weight = odd_unit_strides(problem.weight.contiguous(memory_format=memory_format), stride)
        changes = ({"x": x}, {"weight": weight}, {"x": x, "weight": weight})
        found += [(f"stride {stride} in {', '.join(c)}", problem.replace(**c)) for c in changes]
    return found


LAYOUT_SHAPES = [
    *TELLING_SHAPES,
    *map(shape_named, ("1x1", "one_pixel", "one_row", "one_column", "one_channel", "one_filter", "all_ones")),
    *map(shape_named, ("squeeze_excite", "filter_image", "depthwise_twice")),
]


@pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=str)
def test_fake_strides_are_the_real_ones_and_those_of_conv2d(shape: ConvShape) -> None:
    for name, laid_out in many_layouts(integer_problem(shape, torch.float32)):
        fake = fake_result(laid_out)
        assert_same_layout(fake, operator(*laid_out.operator_arguments()), name)
        if len(shape.padding) == 2:
            assert_same_layout(fake, torch.conv2d(laid_out.x, laid_out.weight, **shape.options()), name)


def test_fake_strides_follow_x_and_weight_only() -> None:
    problem = integer_problem(shape_named("groups_narrow"), torch.float32, Wanted(residual_order="add_act"))
    assert problem.residual is not None
    channels_last = problem.residual.contiguous(memory_format=torch.channels_last)
    laid_out = problem.replace(residual=channels_last)
    assert fake_result(laid_out).is_contiguous()
    assert operator(*laid_out.operator_arguments()).is_contiguous()


def test_the_kernels_checks_allocate_what_the_fake_tensors_promise() -> None:
    if not hasattr(torch.ops.fused_cna, "_checked_output"):
        pytest.skip("needs the compiled extension: " + fused_cna.build_info()["reason"])
    for shape in LAYOUT_SHAPES:
        for name, laid_out in many_layouts(integer_problem(shape, torch.float32)):
            checked = torch.ops.fused_cna._checked_output(*laid_out.operator_arguments())
            assert_same_layout(checked, fake_result(laid_out), f"{shape}: {name}")


def tensors_of(problem: Problem) -> tuple[list[str], list[Tensor]]:
    names = [name for name in TENSORS if getattr(problem, name) is not None]
    return names, [getattr(problem, name) for name in names]


@run_both
@pytest.mark.parametrize("name", ["add_act", "four_pads"])
def test_compile_with_dynamic_shapes(run: Callable[[Problem], Tensor], name: str) -> None:
    problem = PROBLEMS[name]
    names, _ = tensors_of(problem)

    def function(*tensors: Tensor) -> Tensor:
        return run(problem.replace(**dict(zip(names, tensors, strict=True)))) * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        larger = problem.replace(x=problem.x[:1].repeat(batch, 1, 1, 1))
        if problem.residual is not None:
            larger = larger.replace(residual=problem.residual[:1].repeat(batch, 1, 1, 1))
        _, tensors = tensors_of(larger)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_compile_does_not_specialise_on_the_image_size() -> None:
    weight = torch.randn(6, 4, 3, 3)

    def function(x: Tensor) -> Tensor:
        return operator(x, weight, *[None] * 5, 1e-5, [2, 1], [1, 1], [1, 1], 1, "relu", [], None, "add_act")

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 4, 9, 8), (3, 4, 12, 17), (5, 4, 31, 6)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), function(x))
    assert counter.frame_count == 1


@run_both
def test_compile_with_gradients(run: Callable[[Problem], Tensor]) -> None:
    problem = with_gradients(PROBLEMS["add_act"])
    names, tensors = tensors_of(problem)

    def function(*tensors: Tensor) -> Tensor:
        return run(problem.replace(**dict(zip(names, tensors, strict=True)))).square().sum()

    torch._dynamo.reset()
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    expected = torch.autograd.grad(function(*tensors), wanted)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*tensors), wanted)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    problem = PROBLEMS["add_act"]

    def function(x: Tensor, residual: Tensor) -> Tensor:
        y = operator(*problem.replace(x=x * 2, residual=residual).operator_arguments())
        return y.relu() + problem.call(fused_cna.conv_norm_act)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert problem.residual is not None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = problem.x.contiguous(memory_format=memory_format)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x, problem.residual), function(x, problem.residual))


class Calls(torch.nn.Module):
    """A network of one call, for export."""

    def __init__(self, problem: Problem, run: Callable[[Problem], Tensor]) -> None:
        super().__init__()
        self.problem, self.run = problem, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.problem.replace(x=x, residual=None))


@run_both
@pytest.mark.parametrize("name", ["plain", "add_act", "four_pads"])
def test_export_save_and_load(run: Callable[[Problem], Tensor], name: str) -> None:
    problem = PROBLEMS[name]
    x = torch.cat([problem.x, problem.x])
    dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(Calls(problem, run), (x,), dynamic_shapes=({**dynamic},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (2, 5):
        x = torch.randn(batch, *problem.x.shape[1:])
        torch.testing.assert_close(loaded(x), run(problem.replace(x=x, residual=None)))


@run_both
@pytest.mark.parametrize("mapped", ["x", "weight", "x and residual", "norm_bias"])
def test_vmap(run: Callable[[Problem], Tensor], mapped: str) -> None:
    problem = PROBLEMS["add_act"].map(Tensor.double)
    names = mapped.split(" and ")
    stacks = [torch.randn(3, *getattr(problem, name).shape, dtype=torch.float64) for name in names]

    def function(*tensors: Tensor) -> Tensor:
        return run(problem.replace(**dict(zip(names, tensors, strict=True))))

    actual = torch.func.vmap(function)(*stacks)
    expected = torch.stack([function(*tensors) for tensors in zip(*stacks, strict=True)])
    torch.testing.assert_close(actual, expected)


def test_vmap_over_another_dimension() -> None:
    problem = PROBLEMS["plain"].map(Tensor.double)
    stack = torch.randn(*problem.x.shape, 4, dtype=torch.float64)
    actual = torch.func.vmap(
        lambda x: operator(*problem.replace(x=x).operator_arguments()), in_dims=4, out_dims=1
    )(stack)
    expected = [operator(*problem.replace(x=stack[..., i]).operator_arguments()) for i in range(4)]
    torch.testing.assert_close(actual, torch.stack(expected, dim=1))


def test_per_sample_gradients() -> None:
    problem = PROBLEMS["add_act"].replace(residual=None).map(Tensor.double)
    images = torch.randn(4, 1, *problem.x.shape[1:], dtype=torch.float64)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return operator(*problem.replace(x=image, weight=weight).operator_arguments()).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(problem.weight, images)
    for index, image in enumerate(images):
        weight = problem.weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight, image), weight)
        torch.testing.assert_close(actual[index], expected)


def test_forward_mode_gradients() -> None:
    problem = PROBLEMS["act_add"]
    direction = torch.randn(problem.x.shape, dtype=problem.x.dtype)

    def function(x: Tensor) -> Tensor:
        return operator(*problem.replace(x=x).operator_arguments())

    _, actual = torch.func.jvp(function, (problem.x,), (direction,))
    step = 1e-6
    expected = (function(problem.x + step * direction) - function(problem.x - step * direction)) / (2 * step)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
