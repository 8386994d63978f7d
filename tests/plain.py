"""The module that people write by hand, which `ConvNormAct` replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_cna import ConvNormAct


class Plain(nn.Module):
    """act(norm(conv(x)))"""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        act: Callable[[], nn.Module] | None = nn.ReLU,
        padding_mode: str = "zeros",
        residual_order: str = "add_act",
    ) -> None:
        super().__init__()
        if padding is None:
            sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
            steps = dilation if isinstance(dilation, tuple) else (dilation, dilation)
            padding = tuple(step * (size - 1) // 2 for size, step in zip(sizes, steps, strict=True))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        self.norm = norm(out_channels) if norm is not None else nn.Identity()
        self.act = act() if act is not None else nn.Identity()
        self.residual_order = residual_order

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(self.conv(x))
        if residual is None:
            return self.act(z)
        if self.residual_order == "add_act":
            return self.act(z + residual)
        return self.act(z) + residual


def pair(*args: Any, seed: int = 0, **options: Any) -> tuple[ConvNormAct, Plain]:
    """A fused and a plain module with the same arguments and values, trained a little, in eval mode."""
    torch.manual_seed(seed)
    plain = Plain(*args, **options)
    for name, value in [*plain.named_parameters(), *plain.named_buffers()]:
        if name.startswith("norm.") and value.is_floating_point():
            spread = torch.rand_like(value)
            value.data.copy_(0.5 + spread if name.endswith(("weight", "running_var")) else spread - 0.5)
    fused = ConvNormAct(*args, **options)
    fused.load_state_dict(plain.state_dict())
    return fused.eval(), plain.eval()


def assert_same_answers(
    fused: nn.Module, plain: nn.Module, x: Tensor, residual: Tensor | None = None, **tolerances: float
) -> Tensor:
    """The same results with gradients recorded, without, and in inference mode; returns one of them."""
    arguments = (x,) if residual is None else (x, residual)
    expected = plain(*arguments).detach()
    torch.testing.assert_close(fused(*arguments).detach(), expected, **tolerances)
    with torch.no_grad():
        torch.testing.assert_close(fused(*arguments), expected, **tolerances)
    with torch.inference_mode():
        torch.testing.assert_close(fused(*arguments), expected, **tolerances)
    return expected
