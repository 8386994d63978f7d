"""FrozenConv computes what the ConvNormAct computed that it is a snapshot of."""

from __future__ import annotations

import copy
import io
import pickle
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
from fused_cna.fusion import frozen
from fused_cna.fusion.frozen import FrozenConv
from tests.reference import assert_close_in_any_order, library_bound, relative_error

needs_onednn = pytest.mark.skipif(
    torch.float32 not in frozen._ONEDNN_DTYPES, reason="needs a torch with oneDNN"
)
residual_orders = pytest.mark.parametrize("order", ["add_act", "act_add"])

ACTS: dict[str, Callable[[], nn.Module] | None] = {
    "identity": None,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "elu": partial(nn.ELU, 0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
    "hardtanh, not in the table": partial(nn.Hardtanh, -0.5, 0.25),
    "prelu, with a parameter": partial(nn.PReLU, 8, 0.3),
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
    "no bias": {"bias": False},
    "no norm": {"norm": None},
    "neither": {"norm": None, "bias": False},
    "norm without affine": {"norm": partial(nn.BatchNorm2d, affine=False)},
}


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make(**options: Any) -> ConvNormAct:
    """A block whose norm would show if it were dropped or folded wrongly."""
    torch.manual_seed(0)
    block = ConvNormAct(4, 8, **options).eval()
    if isinstance(block.norm, nn.BatchNorm2d) and block.norm.running_mean is not None:
        assert block.norm.running_var is not None
        nn.init.normal_(block.norm.running_mean)
        nn.init.uniform_(block.norm.running_var, 0.2, 3.0)
        if block.norm.affine:
            nn.init.uniform_(block.norm.weight, 0.5, 2.0)
            nn.init.normal_(block.norm.bias)
    return block


def error_of(module: nn.Module, block: nn.Module, *inputs: Tensor) -> float:
    expected = copy.deepcopy(block).double()(*(tensor.double() for tensor in inputs))
    return relative_error(module(*inputs), expected)


def check_error(module: nn.Module, block: nn.Module, *inputs: Tensor) -> None:
    """That of the block itself is the measure: which order of summation oneDNN has, no test knows."""
    allowed = library_bound(block(*inputs).dtype, error_of(block, block, *inputs))
    assert error_of(module, block, *inputs) <= allowed


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@residual_orders
def test_every_convolution(conv: dict[str, Any], order: str, channels_last: bool) -> None:
    block = make(residual_order=order, **conv)
    x = image(2, 4, 12, 11)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    residual = torch.randn_like(block(x))
    given = residual.clone()
    module = FrozenConv.from_block(block)
    check_error(module, block, x)
    check_error(module, block, x, residual)
    assert torch.equal(residual, given)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@residual_orders
def test_every_activation(act: Callable[[], nn.Module] | None, order: str) -> None:
    block = make(act=act, residual_order=order)
    module = FrozenConv.from_block(block)
    x = image(2, 4, 9, 8)
    check_error(module, block, x)
    check_error(module, block, x, image(2, 8, 9, 8))


@needs_onednn
@pytest.mark.parametrize("conv", ["3x3", "depthwise", "asymmetric", "reflect", "no norm"])
def test_one_call_to_onednn(conv: str, packed_calls: list[str]) -> None:
    module = FrozenConv.from_block(make(act=nn.SiLU, **CONVS[conv]))
    module(image(2, 4, 9, 8))
    assert packed_calls == ["_convolution"]


@needs_onednn
def test_one_call_with_a_residual(packed_calls: list[str]) -> None:
    FrozenConv.from_block(make())(image(2, 4, 9, 8), image(2, 8, 9, 8))
    assert packed_calls == ["_convolution_add"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@residual_orders
def test_dtypes(dtype: torch.dtype, order: str) -> None:
    block = make(act=nn.SiLU, residual_order=order).to(dtype)
    module = FrozenConv.from_block(block)
    x, residual = image(2, 4, 9, 8).to(dtype), image(2, 8, 9, 8).to(dtype)
    assert module.weight.dtype == dtype
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
    module = FrozenConv.from_block(block)
    torch.testing.assert_close(module.weight, weight.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(module.bias, bias.float(), rtol=1e-7, atol=0)


def test_is_a_snapshot() -> None:
    block = make(act=partial(nn.PReLU, 8))
    module, x = FrozenConv.from_block(block), image(2, 4, 9, 8)
    before = module(x)
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(3.0)
    assert torch.equal(module(x), before)
    assert torch.equal(module.train()(x), before)
    assert not module.state_dict().keys() - {"act.weight"}


@pytest.mark.parametrize("size", [(4, 9, 8), (0, 4, 9, 8), (1, 4, 3, 3)])
def test_shapes(size: tuple[int, ...]) -> None:
    block = make()
    module, x = FrozenConv.from_block(block), image(*size)
    assert_close_in_any_order(module(x), block(x))


def test_many_shapes_of_input() -> None:
    block = make()
    module = FrozenConv.from_block(block)
    for size in [*range(3, 30), 3]:
        check_error(module, block, image(1, 4, size, 5))
    assert module._packed is None or len(module._packed.by_shape) <= frozen._MOST_SHAPES


@needs_onednn
def test_shapes_share_a_packed_weight() -> None:
    module = FrozenConv.from_block(make(kernel_size=1))
    for size in (8, 16):
        module(image(1, 4, size, size))
    assert module._packed is not None
    assert len(module._packed.by_shape) == 2
    assert len({id(weight) for weight in module._packed.by_shape.values()}) == 1


@residual_orders
def test_residuals_of_another_shape_or_dtype(order: str) -> None:
    """Python code that adds broadcasts and promotes, and a frozen block stands for such code."""
    block = make(residual_order=order)
    module, x = FrozenConv.from_block(block), image(2, 4, 9, 8)
    for residual in (image(1, 8, 1, 1), image(2, 8, 9, 8).double()):
        z = block.norm(block.conv(x))
        expected = block.act(z + residual) if order == "add_act" else block.act(z) + residual
        assert_close_in_any_order(module(x, residual), expected)
    with pytest.raises(RuntimeError, match="must match the size"):
        module(x, image(2, 7, 9, 8))


def test_inputs_that_do_not_fit() -> None:
    module = FrozenConv.from_block(make())
    for size, words in (
        ((2, 5, 9, 8), "to have 4 channels, but got 5"),
        ((2, 4, 9, 0), "Kernel size can't be greater"),
        ((4, 9), "Expected 3D .* or 4D"),
        ((2, 4, 9, 8, 7), "Expected 3D .* or 4D"),
    ):
        with pytest.raises(RuntimeError, match=words):
            module(image(*size))
    with pytest.raises(RuntimeError, match=r"Kernel size can't be greater"):
        FrozenConv.from_block(make(kernel_size=5, padding=1))(image(2, 4, 2, 9))
    with pytest.raises(RuntimeError, match=r"[Ff]loat"):
        module(image(2, 4, 9, 8).double())


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(used: bool) -> None:
    module, x = FrozenConv.from_block(make()), image(2, 4, 9, 8)
    expected = copy.deepcopy(module)(x)
    if used:
        module(x)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert twin._packed is None
        assert twin.weight.data_ptr() != module.weight.data_ptr()
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


@needs_onednn
def test_casts_repack() -> None:
    block = make()
    module, x = FrozenConv.from_block(block), image(2, 4, 9, 8)
    module(x)
    module.bfloat16()
    assert module._packed is None
    assert module(x.bfloat16()).dtype == torch.bfloat16
    module.weight = torch.zeros_like(module.weight)
    assert torch.equal(module(x.bfloat16()), F.relu(module.bias)[:, None, None].expand(2, 8, 9, 8))


@pytest.mark.parametrize("inference", [False, True])
def test_gradient_of_the_input(inference: bool) -> None:
    block = make(act=nn.SiLU).requires_grad_(False)
    with torch.inference_mode(inference):
        module = FrozenConv.from_block(block)
        module(image(2, 4, 9, 8))
    with torch.enable_grad():
        x, residual = image(2, 4, 9, 8).requires_grad_(), image(2, 8, 9, 8).requires_grad_()
        got = torch.autograd.grad(module(x, residual).square().sum(), (x, residual))
        expected = torch.autograd.grad(block(x, residual).square().sum(), (x, residual))
    assert_close_in_any_order(got, expected)


def test_forward_gradient_and_vmap() -> None:
    block = make(act=nn.SiLU)
    module, x, tangent = FrozenConv.from_block(block), image(2, 4, 9, 8), image(2, 4, 9, 8, seed=2)
    assert_close_in_any_order(
        torch.func.jvp(module, (x,), (tangent,)), torch.func.jvp(block, (x,), (tangent,))
    )
    assert_close_in_any_order(torch.vmap(module)(x[:, None]), block(x)[:, None])


def test_autocast() -> None:
    block, x = make(), image(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        module = FrozenConv.from_block(block)
        assert module(x).dtype == torch.bfloat16
        check_error(module, block, x)


def test_onednn_switched_off(packed_calls: list[str]) -> None:
    block, x = make(), image(2, 4, 9, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close_in_any_order(FrozenConv.from_block(block)(x), block(x))
    assert packed_calls == []


@pytest.mark.parametrize("used", [False, True])
def test_traces(used: bool) -> None:
    block = make(act=nn.SiLU, kernel_size=4, padding="same")
    module, x, residual = FrozenConv.from_block(block), image(2, 4, 9, 8), image(2, 8, 9, 8)
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
    module, x, residual = FrozenConv.from_block(block), image(2, 4, 9, 8), image(2, 8, 9, 8)
    assert_close_in_any_order(torch.compile(module, fullgraph=True)(x, residual), block(x, residual))


def test_threads_pack_at_once() -> None:
    block = make()
    module = FrozenConv.from_block(block)
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


def test_parametrized_weight() -> None:
    block = make()
    parametrizations.weight_norm(block.conv)
    block.conv.parametrizations.weight.original0.mul_(2.0)  # type: ignore[union-attr, operator]
    assert error_of(FrozenConv.from_block(block), block, image(2, 4, 9, 8)) < 4e-7


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_what_cannot_be_frozen() -> None:
    hooked = make()
    hooked.norm.register_forward_hook(lambda *_: None)
    for block, reason in (
        (make().train(), "training mode"),
        (make(norm=partial(nn.BatchNorm2d, track_running_stats=False)), "no batch norm with running"),
        (make(norm=partial(nn.GroupNorm, 2)), "a GroupNorm, is no batch norm"),
        (ConvNormAct.from_modules(StandardizedConv(4, 8, 3)).eval(), "conv is a StandardizedConv"),
        (hooked, "its norm has hooks"),
    ):
        with pytest.raises(ValueError, match=reason):
            FrozenConv.from_block(block)
    with pytest.raises(TypeError, match=r"must be a ConvNormAct, but got Conv2d"):
        FrozenConv.from_block(nn.Conv2d(4, 8, 3))  # type: ignore[arg-type]


def test_describes_itself() -> None:
    assert repr(FrozenConv.from_block(make(groups=2))) == (
        "FrozenConv(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2, "
        "act='relu', residual_order='add_act')"
    )
