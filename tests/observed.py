"""Networks that torch.fx cannot follow, and what is asked of them when they are fused by observing a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_cna
from fused_cna import layers
from fused_cna.fusion.records import NAME, LayerRecord


class Untraceable(nn.Module):
    """Two groups of a convolution and a norm, and Python code between that depends on values."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, groups=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.between = between
        self.kept: Any = None

    def forward(self, x: Tensor) -> Any:
        if x.isnan().any():
            return x
        return self.between(self, x)


def chain(net: Any, x: Tensor) -> Tensor:
    """Both groups, one after the other."""
    return net.relu(net.bn2(net.conv2(net.relu(net.bn1(net.conv1(x))))))


def randomized(network: nn.Module) -> nn.Module:
    """In float64 and eval mode, with statistics that show where a norm is missing."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if layers.is_batch_norm(module):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                if value is not None:
                    value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.double().eval()


def untraceable(between: Callable[[Any, Tensor], Tensor]) -> Untraceable:
    torch.manual_seed(0)
    network = randomized(Untraceable(between))
    assert isinstance(network, Untraceable)
    return network


def image(seed: int = 2, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size or (2, 3, 8, 9), generator=generator, dtype=torch.float64)


def layers_of(network: nn.Module) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in network.__dict__[NAME].layers}


def parts_of(network: nn.Module) -> dict[str, str]:
    return {name: layer.parts for name, layer in layers_of(network).items()}


def observed(network: nn.Module, x: Any = None, **options: Any) -> nn.Module:
    return fused_cna.fuse(network, example_inputs=image() if x is None else x, **options)


class Calls(TorchDispatchMode):
    """Counts the fused operator's calls, and those of batch norms outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is torch.ops.fused_cna.conv_norm_act.default
        self.norms += "batch_norm" in func.__name__
        return func(*args, **(kwargs or {}))


def assert_same(fused: nn.Module, plain: nn.Module, *inputs: Any) -> None:
    """Compares results with and without gradients; inputs are copied, as networks may overwrite them."""
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            expected, actual = ([x.clone() for x in inputs] for _ in range(2))
            torch.testing.assert_close(fused(*actual), plain(*expected), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
