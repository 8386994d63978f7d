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
from tests.plain import assert_same_answers, pair
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


def test_compile_is_silent_and_whole_in_eval_mode_with_gradients_on(device: str) -> None:
    """What the module would say about inference mode must not break the graph."""
    fused, plain = pair(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(fused.to(device), fullgraph=True, backend="aot_eager")
    x = image(2, 4, 8, 9).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fused_cna.FusionFallbackWarning)
        torch.testing.assert_close(compiled(x), plain.to(device)(x))


def test_a_compiled_module_sees_changed_parameters(device: str) -> None:
    fused, plain = pair(4, 6)
    fused, plain = fused.to(device), plain.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = image(2, 4, 8, 9).to(device)
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


def randomise_statistics(network: nn.Module) -> None:
    """Weights of a fresh network with statistics of a trained one, taken from a random batch."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(image(4, 3, 64, 64, seed=5))
    network.eval()


def swap_sequences(network: nn.Module, sequence: type[nn.Sequential]) -> int:
    """Replaces every (conv, norm, act) sequence of a class; returns how many."""
    count = 0
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, sequence):
                parts = list(child)
                assert isinstance(parts[0], nn.Conv2d)
                setattr(module, name, ConvNormAct.from_modules(*parts).eval())
                count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_torchvision_networks_of_conv_norm_activation(name: str, device: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    network = getattr(torchvision.models, name)(weights=None)
    randomise_statistics(network)
    swapped = copy.deepcopy(network)
    assert swap_sequences(swapped, torchvision.ops.Conv2dNormActivation) >= 30
    x = image(2, 3, 64, 64).to(device)
    assert_same_answers(swapped.to(device), network.to(device), x, rtol=1e-3, atol=1e-4)


class FusedBasicBlock(nn.Module):
    """torchvision's BasicBlock with the addition and the last ReLU in its second convolution."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = ConvNormAct.from_modules(block.conv1, block.bn1, block.relu)
        self.second = ConvNormAct.from_modules(block.conv2, block.bn2, block.relu)
        self.shortcut = None
        if block.downsample is not None:
            self.shortcut = ConvNormAct.from_modules(block.downsample[0], block.downsample[1])

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.second(self.first(x), shortcut)


@pytest.mark.slow
def test_resnet18_with_residuals(device: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    network = torchvision.models.resnet18(weights=None)
    randomise_statistics(network)
    swapped = copy.deepcopy(network)
    swapped.conv1 = ConvNormAct.from_modules(swapped.conv1, swapped.bn1, swapped.relu)
    swapped.bn1 = swapped.relu = nn.Identity()
    for layer in (swapped.layer1, swapped.layer2, swapped.layer3, swapped.layer4):
        for index, block in enumerate(layer):
            layer[index] = FusedBasicBlock(block)
    x = image(2, 3, 64, 64).to(device)
    assert_same_answers(swapped.eval().to(device), network.to(device), x, rtol=1e-3, atol=1e-4)
