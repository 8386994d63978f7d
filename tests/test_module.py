"""ConvNormAct in place of the module that people write by hand."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_cna import ConvNormAct
from tests.plain import Plain, assert_same_answers, pair
from tests.reference import assert_close_in_any_order

residual_orders = pytest.mark.parametrize("residual_order", ["add_act", "act_add"])

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "stride": {"stride": 2},
    "pairs": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "groups": {"groups": 2, "bias": False},
    "no_norm": {"norm": None},
    "no_act": {"act": None},
    "bare": {"norm": None, "act": None, "bias": False},
    "1x1": {"kernel_size": 1},
    "silu": {"act": nn.SiLU},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@options
def test_same_answers(options: dict[str, Any], device: str) -> None:
    fused, plain = pair(4, 6, **options)
    assert_same_answers(fused.to(device), plain.to(device), image(2, 4, 12, 11).to(device))


def test_signature() -> None:
    parameters = inspect.signature(ConvNormAct).parameters.values()
    assert [p.name for p in parameters] == [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "norm",
        "act",
        "padding_mode",
        "residual_order",
        "device",
        "dtype",
    ]
    assert [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY] == (
        ["padding_mode", "residual_order", "device", "dtype"]
    )
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert defaults == {
        "kernel_size": 3,
        "stride": 1,
        "padding": None,
        "dilation": 1,
        "groups": 1,
        "bias": True,
        "norm": nn.BatchNorm2d,
        "act": nn.ReLU,
        "padding_mode": "zeros",
        "residual_order": "add_act",
        "device": None,
        "dtype": None,
    }


def test_every_argument_by_position() -> None:
    arguments = (4, 6, 3, 2, 2, 2, 2, False, nn.BatchNorm2d, nn.SiLU)
    fused, plain = pair(*arguments)
    assert repr(fused.conv) == repr(plain.conv)
    assert_same_answers(fused, plain, image(2, 4, 13, 12))


@options
def test_state_dict_goes_both_ways(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, fused = Plain(4, 6, **options), ConvNormAct(4, 6, **options)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for source, target in ((plain, fused), (fused, plain)):
        for value in source.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5)
        target.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name
        assert_same_answers(fused.eval(), plain.eval(), image(1, 4, 9, 9))


@options
def test_same_initialisation_under_the_same_seed(options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    plain = Plain(4, 6, **options)
    torch.manual_seed(7)
    fused = ConvNormAct(4, 6, **options)
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5},
        {"kernel_size": 4},
        {"kernel_size": 1},
        {"kernel_size": (1, 7)},
        {"kernel_size": (4, 3), "dilation": (3, 2)},
        {"dilation": 2},
        {"padding": 0},
        {"padding": 2},
        {"padding": (2, 0)},
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (4, 2), "dilation": (1, 3)},
        {"padding": "valid", "stride": 2},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular", "padding": (2, 1), "stride": 2},
        {"padding_mode": "replicate", "padding": "same", "kernel_size": 4},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding(options: dict[str, Any], device: str) -> None:
    fused, plain = pair(4, 6, **options)
    assert_same_answers(fused.to(device), plain.to(device), image(2, 4, 11, 12).to(device))


def test_padding_zero_is_not_padding_none() -> None:
    assert ConvNormAct(2, 3, 3, padding=0).eval()(image(1, 2, 5, 5)).shape == (1, 3, 3, 3)
    assert ConvNormAct(2, 3, 3, padding=None).eval()(image(1, 2, 5, 5)).shape == (1, 3, 5, 5)


def test_repr_shows_the_three_modules() -> None:
    fused = ConvNormAct(4, 6, 3, 2, act=partial(nn.LeakyReLU, 0.2))
    shown = repr(fused)
    assert shown.startswith("ConvNormAct(")
    for name in ("conv", "norm", "act"):
        assert f"({name}): {getattr(fused, name)!r}" in shown


def test_repr_tells_the_residual_orders_apart() -> None:
    assert repr(ConvNormAct(4, 6, residual_order="act_add")) != repr(ConvNormAct(4, 6))


@residual_orders
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@options
def test_residual(options: dict[str, Any], train: bool, residual_order: str, device: str) -> None:
    fused, plain = pair(4, 6, residual_order=residual_order, **options)
    x = image(2, 4, 12, 11)
    residual = image(*plain(x).shape, seed=2).to(device)
    assert_same_answers(fused.to(device).train(train), plain.to(device).train(train), x.to(device), residual)


@pytest.mark.parametrize(
    "copy_of",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(saved(module), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_independent(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    fused, plain = pair(4, 6, 3, 2, groups=2, act=nn.SiLU, residual_order="act_add")
    x = image(2, 4, 8, 8)
    expected = plain(x)
    with torch.inference_mode():
        fused(x)
    other = copy_of(fused)
    assert type(other) is ConvNormAct
    assert_same_answers(other, plain, x, torch.ones_like(expected))
    with torch.no_grad():
        fused.conv.weight.zero_()
        fused.norm.running_var.fill_(9)
    assert_same_answers(other, plain, x)


def saved(module: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [
        (lambda module: module.double(), 1e-12),
        (lambda module: module.half(), 4e-3),
        (lambda module: module.bfloat16(), 3e-2),
        (lambda module: module.to(torch.float64), 1e-12),
        (lambda module: module.to(memory_format=torch.channels_last), 1e-5),
        (lambda module: module.half().float(), 1e-5),
    ],
    ids=["double", "half", "bfloat16", "to_float64", "channels_last", "there_and_back"],
)
def test_conversions(convert: Callable[[nn.Module], nn.Module], tolerance: float, device: str) -> None:
    fused, plain = pair(4, 6, act=nn.SiLU)
    fused, plain = convert(fused.to(device)), convert(plain.to(device))
    assert fused.conv.weight.stride() == plain.conv.weight.stride()
    x = image(2, 4, 8, 9).to(device, fused.conv.weight.dtype)
    assert_same_answers(fused, plain, x, rtol=tolerance, atol=tolerance)


def test_device_and_dtype_arguments() -> None:
    fused = ConvNormAct(4, 6, device="meta", dtype=torch.float16)
    for name, value in fused.state_dict().items():
        assert value.is_meta, name
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name


def test_training_updates_the_running_statistics(device: str) -> None:
    fused, plain = pair(4, 6, norm=partial(nn.BatchNorm2d, momentum=0.3))
    fused, plain = fused.to(device).train(), plain.to(device).train()
    for seed in range(3):
        x = image(2, 4, 8, 9, seed=seed).to(device)
        torch.testing.assert_close(fused(x), plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=name)
    assert fused.norm.num_batches_tracked == 3
    assert_same_answers(fused.eval(), plain.eval(), x)
    assert fused.norm.num_batches_tracked == 3


@pytest.mark.parametrize("norm_trains", [False, True])
def test_the_norm_has_its_own_mode(norm_trains: bool, device: str) -> None:
    """Fine-tuning freezes the statistics of a module in training mode; calibration does the opposite."""
    fused, plain = pair(4, 6)
    for module in (fused.to(device), plain.to(device)):
        module.train(not norm_trains)
        module.norm.train(norm_trains)
    assert_same_answers(fused, plain, image(2, 4, 8, 9).to(device))
    assert fused.norm.num_batches_tracked == (3 if norm_trains else 0)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "only_input"])
def test_gradients(train: bool, frozen: bool, device: str) -> None:
    fused, plain = pair(4, 6, 3, 2, act=nn.SiLU)
    results = []
    for module in (fused, plain):
        module.to(device).train(train).requires_grad_(not frozen)
        x = image(2, 4, 8, 9).to(device).requires_grad_()
        residual = image(2, 6, 4, 5, seed=2).to(device).requires_grad_()
        module(x, residual).square().sum().backward()
        results.append(
            {"x": x.grad, "residual": residual.grad} | {n: p.grad for n, p in module.named_parameters()}
        )
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        assert (expected is None) == (frozen and name not in ("x", "residual"))
        assert_close_in_any_order(results[0][name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_gradient_for_the_parameters_alone_in_eval_mode(device: str) -> None:
    fused, plain = pair(4, 6)
    x = image(2, 4, 8, 9).to(device)
    fused.to(device)(x).sum().backward()
    plain.to(device)(x).sum().backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close_in_any_order(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_inference_mode(device: str) -> None:
    fused, plain = pair(4, 6)
    x = image(2, 4, 8, 9).to(device)
    with torch.inference_mode():
        y = fused.to(device)(x)
    assert y.is_inference()
    torch.testing.assert_close(y, plain.to(device)(x).detach())


@residual_orders
def test_unbatched(residual_order: str, device: str) -> None:
    fused, plain = pair(4, 6, residual_order=residual_order, stride=2)
    fused, plain = fused.to(device), plain.to(device)
    x, residual = image(1, 4, 8, 9).to(device), image(1, 6, 4, 5, seed=2).to(device)
    with torch.inference_mode():
        y = fused(x[0], residual[0])
    assert y.shape == (6, 4, 5)
    torch.testing.assert_close(y, plain(x, residual)[0].detach())


def test_empty_batch(device: str) -> None:
    fused, _ = pair(4, 6, stride=2)
    with torch.inference_mode():
        assert fused.to(device)(torch.empty(0, 4, 8, 9, device=device)).shape == (0, 6, 4, 5)


@pytest.mark.parametrize("in_place", [False, True])
def test_inputs_are_not_changed(in_place: bool, device: str) -> None:
    fused, _ = pair(4, 6, act=partial(nn.ReLU, inplace=in_place))
    fused = fused.to(device)
    bare, _ = pair(4, 4, 1, norm=None, act=None)
    x, residual = image(2, 4, 8, 9).to(device), image(2, 6, 8, 9).to(device)
    before = x.clone(), residual.clone()
    for order in ("add_act", "act_add"):
        fused.residual_order = order
        with torch.inference_mode():
            fused(x, residual)
            bare.to(device)(x)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
