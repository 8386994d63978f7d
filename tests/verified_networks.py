"""Networks whose fusion is verified and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """ResNet's, and a squeeze-and-excitation in it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.gate = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Network(nn.Module):
    """Two blocks between a stem with padding of its own and a head without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.first = Block(8)
        self.second = Block(8)
        self.head = nn.Conv2d(8, 5, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.first(nn.functional.silu(self.bn(self.stem(self.pad(x))))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x)).mean((2, 3))


class InPython(Network):
    """A network that FX cannot follow."""

    def forward(self, x: Tensor) -> Any:
        return x if x.isnan().any() else super().forward(x)


def network(kind: Callable[[], nn.Module] = Network, dtype: torch.dtype = torch.float32) -> Any:
    """One whose batch norms do something."""
    torch.manual_seed(0)
    made = kind()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for vector, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5)):
                nn.init.uniform_(getattr(module, vector), low, high)
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return made.eval().to(dtype)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
