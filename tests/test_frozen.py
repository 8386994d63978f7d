"""FrozenConv computes what the ConvNormAct computed that it is a snapshot of."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

from fused_cna import ConvNormAct
from fused_cna.activation import ACTIVATIONS
from fused_cna.fusion import frozen
from fused_cna.fusion.frozen import FrozenConv
from tests.reference import assert_close_in_any_order, library_bound, relative_error

needs_onednn = pytest.mark.skipif(not frozen._onednn_dtypes, reason="needs a torch with oneDNN")
residual_orders = pytest.mark.parametrize("order", ["add_act", "act_add"])

# Those of the table with options other than their defaults.
ACTS: dict[str, Callable[[], nn.Module]] = {
    **{name: row.module for name, row in ACTIVATIONS.items()},
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "elu": partial(nn.ELU, 0.7),
    "gelu_tanh": partial(nn.GELU, "tanh"),
}

CONVS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"kernel_size": 1},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "pairs": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "asymmetric": {"kernel_size": 4, "padding": "same"},
    "reflect": {"padding_mode": "reflect"},
    "reflect, asymmetric": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "zeros around it": {"zero_pad": (0, 1, 2, 1)},
    "cropped": {"zero_pad": (-1, 0, 0, -2), "padding_mode": "circular"},
    "no bias": {"bias": False},
    "no norm": {"norm": None},
    "neither": {"norm": None, "bias": False},
    "norm without affine": {"norm": partial(nn.BatchNorm2d, affine=False)},
}


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make(zero_pad: tuple[int, int, int, int] = (0, 0, 0, 0), **options: Any) -> ConvNormAct:
    """A block whose norm would show if it were dropped or folded wrongly."""
    torch.manual_seed(0)
    block = ConvNormAct(4, 8, **options).eval()
    block.zero_pad = zero_pad
    if isinstance(block.norm, nn.BatchNorm2d) and block.norm.running_mean is not None:
        assert block.norm.running_var is not None
        nn.init.normal_(block.norm.running_mean)
        nn.init.uniform_(block.norm.running_var, 0.2, 3.0)
        if block.norm.affine:
            nn.init.uniform_(block.norm.weight, 0.5, 2.0)
            nn.init.normal_(block.norm.bias)
    return block


def check_error(module: nn.Module, block: nn.Module, *inputs: Tensor) -> None:
    """That of the block itself is the measure: which order of summation oneDNN has, no test knows."""
    expected = copy.deepcopy(block).double()(*(tensor.double() for tensor in inputs))
    y = block(*inputs)
    assert relative_error(module(*inputs), expected) <= library_bound(y.dtype, relative_error(y, expected))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The oneDNN operators that have been called."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        operator = getattr(frozen, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return operator(*args)

        return call

    for name in ("_convolution", "_convolution_add"):
        monkeypatch.setattr(frozen, name, recorded(name))
    return calls


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@residual_orders
def test_every_convolution(conv: dict[str, Any], order: str, memory_format: torch.memory_format) -> None:
    block = make(residual_order=order, **conv)
    x = image(2, 4, 12, 11).to(memory_format=memory_format)
    residual = torch.randn_like(block(x))
    given = residual.clone()
    module = FrozenConv(block)
    check_error(module, block, x)
    check_error(module, block, x, residual)
    assert torch.equal(residual, given)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@residual_orders
def test_every_activation(act: Callable[[], nn.Module], order: str) -> None:
    block = make(act=act, residual_order=order)
    module, x = FrozenConv(block), image(2, 4, 9, 8)
    check_error(module, block, x)
    check_error(module, block, x, image(2, 8, 9, 8))


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_by_the_size_of_the_image(stride: int) -> None:
    conv = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame(4, 8, 3, stride)
    block = ConvNormAct.from_modules(conv, nn.BatchNorm2d(8), nn.SiLU()).eval()
    module = FrozenConv(block)
    for size in ((9, 8), (10, 7)):
        check_error(module, block, x := image(2, 4, *size), torch.randn_like(block(x)))


@needs_onednn
def test_one_call_to_onednn(onednn_calls: list[str]) -> None:
    for conv in ("3x3", "depthwise", "asymmetric", "reflect", "no norm"):
        FrozenConv(make(act=nn.SiLU, **CONVS[conv]))(image(2, 4, 9, 8))
    assert onednn_calls == ["_convolution"] * 5
    FrozenConv(make())(image(2, 4, 9, 8), image(2, 8, 9, 8))
    assert onednn_calls[5:] == ["_convolution_add"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@residual_orders
def test_dtypes(dtype: torch.dtype, order: str) -> None:
    block = make(act=nn.SiLU, residual_order=order).to(dtype)
    module = FrozenConv(block)
    x, residual = image(2, 4, 9, 8).to(dtype), image(2, 8, 9, 8).to(dtype)
    assert module(x).dtype == dtype
    for inputs in ((x,), (x, residual)):
        check_error(module, block, *inputs)


def test_folded_in_float64_and_rounded_once() -> None:
    block = make()
    norm: Any = block.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = block.conv.weight.double() * scale[:, None, None, None]
    assert block.conv.bias is not None
    bias = (block.conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    module = FrozenConv(block)
    torch.testing.assert_close(module.weight, weight.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(module.bias, bias.float(), rtol=1e-7, atol=0)
    before = module(image(2, 4, 9, 8))
    for tensor in (*block.parameters(), norm.running_mean, norm.running_var):
        tensor.fill_(3.0)
    assert torch.equal(module(image(2, 4, 9, 8)), before)
    assert not module.state_dict()


@pytest.mark.parametrize("size", [(4, 9, 8), (0, 4, 9, 8), (1, 4, 3, 3)])
def test_shapes(size: tuple[int, ...]) -> None:
    block = make()
    assert_close_in_any_order(FrozenConv(block)(image(*size)), block(image(*size)))


def test_many_shapes_of_input() -> None:
    block = make()
    module = FrozenConv(block)
    for size in [*range(3, 30), 3]:
        check_error(module, block, image(1, 4, size, 5))
    assert len(module._packed) <= frozen._MOST_SHAPES
    module = FrozenConv(make(kernel_size=1))
    for size in (8, 16):
        module(image(1, 4, size, size))
    assert len({id(weight) for weight in module._packed.values()}) <= 1


@residual_orders
def test_residuals_of_another_shape_or_dtype(order: str) -> None:
    """Python code that adds broadcasts and promotes, and a frozen block stands for such code."""
    block = make(residual_order=order)
    module, x = FrozenConv(block), image(2, 4, 9, 8)
    for residual in (image(1, 8, 1, 1), image(2, 8, 9, 8).double(), 2.0):
        z = block.norm(block.conv(x))
        expected = block.act(z + residual) if order == "add_act" else block.act(z) + residual
        assert_close_in_any_order(module(x, residual), expected)
    with pytest.raises(RuntimeError, match="must match the size"):
        module(x, image(2, 7, 9, 8))


def test_inputs_that_do_not_fit() -> None:
    module = FrozenConv(make())
    for size, words in (
        ((2, 5, 9, 8), "to have 4 channels, but got 5"),
        ((2, 4, 9, 0), "Kernel size can't be greater"),
        ((4, 9), "Expected 3D .* or 4D"),
        ((2, 4, 9, 8, 7), "Expected 3D .* or 4D"),
    ):
        with pytest.raises(RuntimeError, match=words):
            module(image(*size))
    with pytest.raises(RuntimeError, match=r"Kernel size can't be greater"):
        FrozenConv(make(kernel_size=5, padding=1))(image(2, 4, 2, 9))
    with pytest.raises(RuntimeError, match=r"[Ff]loat"):
        module(image(2, 4, 9, 8).double())


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_of_the_input(inference: bool) -> None:
    block = make(act=nn.SiLU).requires_grad_(False)
    with torch.inference_mode(inference):
        module = FrozenConv(block)
        module(image(2, 4, 9, 8))
    x, residual = image(2, 4, 9, 8), image(2, 8, 9, 8)
    close = assert_close_in_any_order
    close(torch.func.jvp(module, (x,), (x,)), torch.func.jvp(block, (x,), (x,)))
    close(torch.vmap(module)(x[:, None]), block(x)[:, None])
    with torch.enable_grad():
        inputs = (x.requires_grad_(), residual.requires_grad_())
        got = torch.autograd.grad(module(*inputs).square().sum(), inputs)
        close(got, torch.autograd.grad(block(*inputs).square().sum(), inputs))


def test_where_onednn_may_not_run(onednn_calls: list[str]) -> None:
    block, x = make(), image(2, 4, 9, 8)
    module = FrozenConv(block)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close_in_any_order(module(x), block(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        check_error(module, block, x)
    assert onednn_calls == []


@pytest.mark.parametrize("used", [False, True])
def test_traces(used: bool) -> None:
    block = make(act=nn.SiLU, kernel_size=4, padding="same")
    module, x, residual = FrozenConv(block), image(2, 4, 9, 8), image(2, 8, 9, 8)
    if used:
        module(x)
    expected = block(x, residual)
    close = assert_close_in_any_order
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x, residual), expected)
    close(torch.export.export(module, (x, residual)).module()(x, residual), expected)
    close(make_fx(module)(x, residual)(x, residual), expected)
    close(fx.symbolic_trace(nn.Sequential(module))(x), block(x))
    close(torch.jit.trace(module, (x, residual))(x, residual), expected)


@pytest.mark.slow
def test_inductor() -> None:
    block = make(act=nn.SiLU)
    module, x, residual = FrozenConv(block), image(2, 4, 9, 8), image(2, 8, 9, 8)
    assert_close_in_any_order(torch.compile(module, fullgraph=True)(x, residual), block(x, residual))


def test_threads_pack_at_once() -> None:
    block = make()
    module = FrozenConv(block)
    images = [image(1 + i % 3, 4, 9, 8, seed=i) for i in range(12)]
    results: dict[int, Tensor] = {}
    start = threading.Barrier(len(images))

    def work(i: int) -> None:
        start.wait()
        with torch.inference_mode():
            results[i] = module(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(images):
        assert_close_in_any_order(results[i], block(x))


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_what_cannot_be_frozen() -> None:
    hooked = make()
    hooked.norm.register_forward_hook(lambda *_: None)
    for block in (
        make().train(),
        make(norm=partial(nn.BatchNorm2d, track_running_stats=False)),
        make(norm=partial(nn.GroupNorm, 2)),
        make(act=partial(nn.PReLU, 8)),
        ConvNormAct.from_modules(StandardizedConv(4, 8, 3)).eval(),
        hooked,
    ):
        with pytest.raises(ValueError, match="cannot freeze this ConvNormAct"):
            FrozenConv(block)
    block = make()
    parametrizations.weight_norm(block.conv)
    block.conv.parametrizations.weight.original0.mul_(2.0)  # type: ignore[union-attr, operator]
    check_error(FrozenConv(block), block, image(2, 4, 9, 8))
