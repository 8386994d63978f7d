"""``out=`` under torch's machinery: opcheck, fake tensors, torch.compile, torch.export, vmap."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from fused_cna import ConvNormAct
from tests.layouts import LAYOUTS, Layout
from tests.reference import Problem, Wanted, random_problem
from tests.shapes import ConvShape

operator = torch.ops.fused_cna.conv_norm_act_out

PROBLEM = random_problem(
    ConvShape("beside", 2, 6, 7, 5, 4, 3, 3, "the image keeps its size", padding=(1, 1), groups=2),
    torch.float32,
    Wanted("leaky_relu", (0.1,), residual_order="add_act"),
)
CHANNELS = PROBLEM.weight.shape[0]


def run_front(problem: Problem, out: Tensor) -> Tensor:
    return problem.call(fused_cna.conv_norm_act, out=out)


def run_operator(problem: Problem, out: Tensor) -> Tensor:
    operator(*problem.operator_arguments(), out)
    return out


run_both = pytest.mark.parametrize("run", [run_front, run_operator], ids=["front", "operator"])
Run = Callable[[Problem, Tensor], Tensor]


def result_of(problem: Problem) -> Tensor:
    return problem.call(fused_cna.conv_norm_act)


def large(batch: int) -> Tensor:
    """A channels_last tensor with room for x, the result, and a margin on either side."""
    _, c, h, w = PROBLEM.x.shape
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, h, w, c + CHANNELS + 5, generator=generator).permute(0, 3, 1, 2)


def beside(run: Run, big: Tensor) -> Tensor:
    """Reads the first channels of a tensor and writes others of it."""
    channels = PROBLEM.x.shape[1]
    out = big[:, channels + 3 : channels + 3 + CHANNELS]
    run(PROBLEM.replace(x=big[:, :channels], residual=None), out)
    return big * 2


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "expanded" not in layout.__name__])
def test_opcheck(layout: Layout) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    out = layout(torch.zeros_like(result_of(PROBLEM)))
    torch.library.opcheck(operator, (*PROBLEM.operator_arguments(), out))


@pytest.mark.parametrize("key", ["CPU", "CUDA", "AutocastCPU", "AutocastCUDA", "AutogradCPU", "AutogradCUDA"])
def test_both_operators_have_the_same_kernels(key: str) -> None:
    for name in ("conv_norm_act", "conv_norm_act_out"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fused_cna::{name}", key), name


def test_fake_tensors_give_nothing() -> None:
    size = result_of(PROBLEM).shape
    with FakeTensorMode() as mode:
        fake, out = PROBLEM.map(mode.from_tensor), torch.empty(size)
        assert operator(*fake.operator_arguments(), out) is None
        assert run_front(fake, out) is out
    meta = PROBLEM.map(lambda tensor: tensor.to("meta"))
    assert operator(*meta.operator_arguments(), torch.empty(size, device="meta")) is None


@run_both
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_writes_into_the_slice(run: Run, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda big: beside(run, big), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for batch in (2, 3):
        expected, actual = large(batch), large(batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(actual), beside(run, expected))
        torch.testing.assert_close(actual, expected)


@run_both
def test_compile_with_the_slice_given(run: Run) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, out: run(PROBLEM.replace(x=x), out) + 1, fullgraph=True, backend="aot_eager"
    )
    expected = result_of(PROBLEM)
    n, k, p, q = expected.shape
    big = torch.full((n, p, q, k + 4), 7.0).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(PROBLEM.x, big[:, 4:]), expected + 1)
    torch.testing.assert_close(big[:, 4:], expected)
    assert (big[:, :4] == 7).all()


def test_compile_does_not_specialise_on_the_image_size() -> None:
    weight = torch.randn(6, 4, 3, 3)

    def function(x: Tensor) -> Tensor:
        big = torch.zeros(x.shape[0], 10, x.shape[2], x.shape[3])
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        operator(x, weight, *[None] * 5, 1e-5, *geometry, "relu", [], None, "add_act", big[:, 2:8])
        return big

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 4, 9, 8), (3, 4, 12, 17), (5, 4, 31, 6)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), function(x))
    assert counter.frame_count == 1


def test_compile_refuses_overlap_that_it_can_see() -> None:
    big = large(2)

    def function(big: Tensor) -> Tensor:
        channels = PROBLEM.x.shape[1]
        out = big[:, channels - 1 : channels - 1 + CHANNELS]
        return run_operator(PROBLEM.replace(x=big[:, :channels], residual=None), out)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad(), pytest.raises(Exception, match="input tensor x and the written-to tensor refer to"):
        compiled(big)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    module = ConvNormAct(6, 8).eval()

    def function(big: Tensor) -> Tensor:
        module(big[:, :6], out=big[:, 6:14])
        run_operator(Problem(big[:, :14], torch.ones(2, 14, 1, 1)), big[:, 14:16])
        return big.relu()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    with torch.inference_mode():
        expected, actual = (torch.ones(2, 7, 5, 20).cumsum(3).permute(0, 3, 1, 2) for _ in range(2))
        torch.testing.assert_close(compiled(actual), function(expected))
        torch.testing.assert_close(actual, expected)


class Beside(torch.nn.Module):
    """`beside` as a network, for export."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, big: Tensor) -> Tensor:
        return beside(self.run, big.clone())


@run_both
@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "dynamo"])
def test_export_save_and_load(run: Run, strict: bool) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(Beside(run), (large(2),), dynamic_shapes=({0: batch},), strict=strict)
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for size in (2, 5):
            torch.testing.assert_close(loaded(large(size)), beside(run, large(size)))


def test_vmap_is_refused_where_it_cannot_work() -> None:
    """Through the operator; what plain PyTorch runs, on a CPU, follows its rules."""
    x, outs = torch.stack([PROBLEM.x] * 3), torch.stack([result_of(PROBLEM)] * 3).zero_()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for fused_cna::conv_norm_act_out"):
        torch.func.vmap(lambda x, out: run_operator(PROBLEM.replace(x=x), out))(x, outs)
    torch.func.vmap(lambda x, out: run_front(PROBLEM.replace(x=x), out))(x, outs)
    torch.testing.assert_close(outs, torch.stack([result_of(PROBLEM)] * 3))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: run_front(PROBLEM.replace(x=x), outs[0]))(x)
