"""ConvNormAct inside networks and under torch's transformations."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cna
from fused_cna import ConvNormAct
from tests.plain import pair
from tests.reference import assert_close_in_any_order


def image(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("residual_order", ["add_act", "act_add"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compile(train: bool, residual_order: str, device: str) -> None:
    fused, plain = pair(4, 6, act=nn.SiLU, residual_order=residual_order)
    fused, plain = fused.to(device).train(train), plain.to(device).train(train)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 8, 9), (3, 4, 11, 7)):
        x = image(*size).to(device)
        residual = image(size[0], 6, *size[2:], seed=2).to(device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, residual), plain(x, residual))
    if train:
        torch.testing.assert_close(fused.norm.running_var, plain.norm.running_var)


def test_compile_with_gradients(device: str) -> None:
    fused, plain = pair(4, 6, act=nn.SiLU)
    fused, plain = fused.to(device).train(), plain.to(device).train()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    x = image(2, 4, 8, 9).to(device)
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close_in_any_order(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_compiled_module_is_silent_and_sees_changed_parameters(device: str) -> None:
    """What the module would say about inference mode must not break the graph."""
    fused, plain = pair(4, 6)
    fused, plain = fused.to(device), plain.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = image(2, 4, 8, 9).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fused_cna.FusionFallbackWarning)
        torch.testing.assert_close(compiled(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))
        for module in (fused, plain):
            module.conv.weight.mul_(3)
            module.norm.running_mean.add_(1)
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
def test_export_save_and_load(unknown: bool, device: str) -> None:
    fused, plain = pair(4, 6, 3, 2, act=nn.Softplus if unknown else nn.ReLU)
    fused, plain = fused.to(device), plain.to(device)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (image(2, 4, 8, 9).to(device), image(2, 6, 4, 5, seed=2).to(device))
    with torch.no_grad():
        exported = torch.export.export(fused, example, dynamic_shapes=({0: batch}, {0: batch}))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    x, residual = image(5, 4, 8, 9).to(device), image(5, 6, 4, 5, seed=3).to(device)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, residual), plain(x, residual))
    assert set(exported.state_dict) == {name for name in fused.state_dict() if not name.startswith("act")}


def test_symbolic_trace() -> None:
    fused, plain = pair(4, 6, act=nn.SiLU)
    traced = torch.fx.symbolic_trace(nn.Sequential(fused))
    x = image(2, 4, 8, 9)
    torch.testing.assert_close(traced(x), plain(x))


def test_construction_without_memory() -> None:
    """As torch.nn's own modules are built where a network is only looked at."""
    with FakeTensorMode():
        module = nn.Sequential(ConvNormAct(4, 6), ConvNormAct(6, 8, stride=2)).eval()
        assert tuple(module(torch.empty(2, 4, 8, 9)).shape) == (2, 8, 4, 5)


def test_functional_call_uses_the_given_parameters(device: str) -> None:
    fused, plain = pair(4, 6)
    x = image(2, 4, 8, 9).to(device)
    other = {name: value * 1.5 for name, value in fused.to(device).state_dict().items()}
    actual = torch.func.functional_call(fused, other, (x,))
    expected = torch.func.functional_call(plain.to(device), other, (x,))
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(actual, fused(x))


def test_vmap_over_an_ensemble() -> None:
    modules = [pair(4, 6, seed=seed)[0].double() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = image(2, 4, 8, 9).double()

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    actual = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(actual, torch.stack([module(x) for module in modules]))


def test_autocast(device: str) -> None:
    fused, plain = pair(4, 6, act=nn.SiLU)
    x = image(2, 4, 8, 9).to(device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        actual, expected = fused.to(device)(x), plain.to(device)(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_training_a_network_gives_the_same_losses() -> None:
    networks, losses = [], []
    for index in (0, 1):
        first, second = pair(3, 8, 3, 2), pair(8, 8, act=nn.SiLU, seed=1)
        networks.append(nn.Sequential(first[index], second[index]).train())
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        history = []
        for step in range(4):
            loss = (network(image(4, 3, 12, 12, seed=step)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for mine, theirs in zip(*[network.state_dict().values() for network in networks], strict=True):
        torch.testing.assert_close(mine, theirs)
