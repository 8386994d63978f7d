"""ConvNormAct with submodules it does not know, that carry hooks or parametrizations, or that change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_cna import ConvNormAct
from tests.plain import Plain, assert_same_answers, pair

residual_orders = pytest.mark.parametrize("residual_order", [None, "add_act", "act_add"])


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def check(fused: nn.Module, plain: nn.Module, device: str = "cpu", residual_order: str | None = None) -> None:
    """Compares the two on a 4-channel image."""
    fused, plain = fused.to(device), plain.to(device)
    x = image(2, 4, 8, 9).to(device)
    residual = None
    if residual_order is not None:
        fused.residual_order = plain.residual_order = residual_order
        residual = image(*plain(x).shape, seed=2).to(device)
    assert_same_answers(fused, plain, x, residual)


class Doubling(nn.BatchNorm2d):
    """A batch norm that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Lifted(nn.ReLU):
    """A ReLU that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Frozen(nn.Module):
    """Statistics and affine parameters as buffers, as torchvision's FrozenBatchNorm2d has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 0.5), ("running_mean", 0.25), ("running_var", 4.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight / (self.running_var + 1e-5).sqrt()).view(-1, 1, 1)
        return x * scale + (self.bias - self.running_mean * scale.flatten()).view(-1, 1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "no_affine": partial(nn.BatchNorm2d, affine=False),
    "large_eps": partial(nn.BatchNorm2d, eps=0.3),
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "no_statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "group_norm": lambda channels: nn.GroupNorm(2, channels),
    "instance_norm": nn.InstanceNorm2d,
    "instance_norm_with_statistics": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "sync_batch_norm": nn.SyncBatchNorm,
    "frozen": Frozen,
    "identity": lambda channels: nn.Identity(),
    "dropout": lambda channels: nn.Dropout2d(),
    "overridden": Doubling,
}


@residual_orders
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_any_norm(norm: Callable[[int], nn.Module], residual_order: str | None, device: str) -> None:
    fused, plain = pair(4, 6, norm=norm, act=nn.SiLU)
    check(fused, plain, device, residual_order)


def changed(act: nn.Module, name: str, value: object) -> nn.Module:
    setattr(act, name, value)
    return act


ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu6_changed": lambda: changed(nn.ReLU6(), "max_val", 2.0),
    "gelu_changed": lambda: changed(nn.GELU(), "approximate", "tanh"),
    "elu_changed": lambda: changed(nn.ELU(), "alpha", 0.2),
    "identity": nn.Identity,
    "relu_in_place": partial(nn.ReLU, inplace=True),
    "leaky_relu_steep": partial(nn.LeakyReLU, 0.3, inplace=True),
    "elu_alpha": partial(nn.ELU, 0.4),
    "silu_in_place": partial(nn.SiLU, True),
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "hardtanh": nn.Hardtanh,
    "hardtanh_as_relu6": partial(nn.Hardtanh, 0.0, 6.0),
    "prelu": partial(nn.PReLU, 6),
    "softmax": nn.Softmax2d,
    "square": Square,
    "sequential": lambda: nn.Sequential(nn.ReLU(), nn.Tanh()),
    "overridden": Lifted,
}


@residual_orders
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_any_activation(act: Callable[[], nn.Module], residual_order: str | None, device: str) -> None:
    fused, plain = pair(4, 6, act=act)
    check(fused, plain, device, residual_order)


@pytest.mark.parametrize("where", ["conv", "norm", "act"])
def test_forward_hooks_are_called_and_obeyed(where: str, device: str) -> None:
    fused, plain = pair(4, 6)
    calls: list[nn.Module] = []

    def before(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        calls.append(module)
        return (arguments[0] + 0.5,)

    def after(module: nn.Module, arguments: tuple[Tensor], result: Tensor) -> Tensor:
        calls.append(module)
        return result * 2

    handles = []
    for module in (fused, plain):
        submodule = module.get_submodule(where)
        handles += [submodule.register_forward_pre_hook(before), submodule.register_forward_hook(after)]
    check(fused, plain, device)
    assert calls.count(fused.get_submodule(where)) == 6
    for handle in handles:
        handle.remove()
    calls.clear()
    check(fused, plain, device)
    assert not calls


@pytest.mark.parametrize("where", ["conv", "norm", "act"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_see_what_they_would_have_seen(where: str, device: str) -> None:
    fused, _ = pair(4, 6, 3, 2)
    calls: list[Any] = []
    module = fused.to(device).get_submodule(where)
    module.register_forward_hook(lambda module, arguments, result: calls.append(tuple(result.shape)))
    module.register_full_backward_pre_hook(lambda *_: calls.append("pre"))
    module.register_full_backward_hook(lambda *_: calls.append("full"))
    fused(image(2, 4, 8, 9).to(device)).sum().backward()
    assert calls == [(2, 6, 4, 5), "pre", "full"]


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def with_old_spectral_norm(module: nn.Module) -> None:
    nn.utils.spectral_norm(module.conv).eval()


PARAMETRIZED: dict[str, Callable[[Any], object]] = {
    "weight": lambda module: parametrize.register_parametrization(module.conv, "weight", Halved()),
    "bias": lambda module: parametrize.register_parametrization(module.conv, "bias", Halved()),
    "norm_weight": lambda module: parametrize.register_parametrization(module.norm, "weight", Halved()),
    "norm_bias": lambda module: parametrize.register_parametrization(module.norm, "bias", Halved()),
    "weight_norm": lambda module: parametrizations.weight_norm(module.conv),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module.conv).eval(),
    "old_weight_norm": lambda module: nn.utils.weight_norm(module.conv),
    "old_spectral_norm": with_old_spectral_norm,
    "pruned_weight": lambda module: prune.l1_unstructured(module.conv, "weight", 0.5),
    "pruned_bias": lambda module: prune.l1_unstructured(module.conv, "bias", 0.5),
}


@pytest.mark.parametrize("change", PARAMETRIZED.values(), ids=PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_parametrizations(change: Callable[[Any], object], device: str) -> None:
    fused, plain = pair(4, 6)
    for module in (fused, plain):
        torch.manual_seed(3)
        change(module)
    fused.load_state_dict(plain.state_dict())
    check(fused, plain, device)
    with torch.no_grad():
        for module in (fused, plain):
            for value in module.parameters():
                value.mul_(1.5)
    check(fused, plain, device)


def step_an_optimizer(module: nn.Module) -> None:
    module(image(1, 4, 6, 6)).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def load_other_values(module: nn.Module, assign: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    state = {
        name: torch.rand(value.shape, generator=generator) + 0.5 if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state, assign=assign)


def set_attribute(path: str, value: object) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(owner), name, value)


CHANGES: dict[str, Callable[[Any], object]] = {
    "data": lambda module: module.conv.weight.data.fill_(0.1),
    "bias": lambda module: module.conv.bias.data.add_(1),
    "statistics": lambda module: (module.norm.running_mean.data.fill_(0.7), module.norm.running_var.mul_(3)),
    "norm_data": lambda module: setattr(module.norm.weight, "data", torch.linspace(0.5, 2, 6)),
    "optimizer": step_an_optimizer,
    "load": partial(load_other_values, assign=False),
    "load_assign": partial(load_other_values, assign=True),
    "weight": set_attribute("conv.weight", nn.Parameter(torch.full((6, 4, 3, 3), 0.1))),
    "no_bias": set_attribute("conv.bias", None),
    "conv": set_attribute("conv", nn.Conv2d(4, 6, 5, 2, (1, 2), bias=False)),
    "norm_module": set_attribute("norm", nn.GroupNorm(3, 6)),
    "norm_identity": set_attribute("norm", nn.Identity()),
    "act_module": set_attribute("act", nn.SiLU()),
    "act_unknown": set_attribute("act", nn.Softplus()),
    "stride": set_attribute("conv.stride", (2, 1)),
    "padding": set_attribute("conv.padding", (0, 2)),
    "dilation": set_attribute("conv.dilation", (1, 2)),
    "eps": set_attribute("norm.eps", 0.4),
    "no_statistics": lambda module: (
        setattr(module.norm, "running_mean", None),
        setattr(module.norm, "running_var", None),
    ),
    "slope": set_attribute("act.negative_slope", 0.9),
    "frozen": lambda module: module.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen_by_the_next_call(change: Callable[[Any], object], device: str) -> None:
    fused, plain = pair(4, 6, act=partial(nn.LeakyReLU, 0.1))
    check(fused, plain, device)
    before = plain(image(2, 4, 8, 9).to(device))
    for module in (fused.cpu(), plain.cpu()):
        change(module)
    check(fused, plain, device)
    after = plain(image(2, 4, 8, 9).to(device))
    assert not after.requires_grad or after.shape != before.shape or not torch.equal(after, before)


class SameConv(nn.Conv2d):
    """A convolution that is not quite one: it standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("conv_class", [nn.Conv2d, SameConv])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), None], ids=["batch_norm", "group_norm", "none"]
)
@pytest.mark.parametrize("act", [nn.SiLU(), nn.Softplus(), None], ids=["silu", "softplus", "none"])
@residual_orders
def test_from_modules(
    conv_class: type[nn.Conv2d],
    norm: nn.Module | None,
    act: nn.Module | None,
    residual_order: str | None,
    device: str,
) -> None:
    conv = conv_class(4, 6, 3, stride=2, padding=(2, 1))
    fused = ConvNormAct.from_modules(conv, norm, act).eval()
    assert fused.conv is conv
    assert {id(p) for p in fused.parameters()} == {id(p) for m in (conv, norm) if m for p in m.parameters()}
    plain = Plain(4, 6)
    plain.conv, plain.norm, plain.act = conv, norm or nn.Identity(), act or nn.Identity()
    check(fused, plain.eval(), device, residual_order)
    with torch.no_grad():
        conv.weight.mul_(2)
    check(fused, plain, device, residual_order)


def test_from_modules_keeps_everything_as_it_was() -> None:
    conv, norm, act = nn.Conv2d(4, 6, 3).eval(), nn.BatchNorm2d(6).eval(), nn.ReLU()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    x = image(2, 4, 8, 9)
    torch.testing.assert_close(ConvNormAct.from_modules(conv, norm, act)(x), act(norm(conv(x))))
    assert not norm.training
    torch.testing.assert_close(dict(norm.state_dict()), state, rtol=0, atol=0)


def test_a_forward_set_on_the_object_is_called(device: str) -> None:
    for name in ("conv", "norm", "act"):
        fused, plain = pair(4, 6)
        for module in (fused, plain):
            submodule = module.get_submodule(name)
            submodule.forward = lambda x, old=submodule.forward: old(x) + 1
        check(fused, plain, device)


def test_global_hooks_see_every_submodule() -> None:
    """Profilers and FLOP counters rest on them."""
    fused, _ = pair(4, 6)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        with torch.inference_mode():
            fused(image(2, 4, 8, 9))
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "ConvNormAct"]
