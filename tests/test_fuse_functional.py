"""Convolutions that are modules, with padding and batch norms that are functions around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_cna
from tests.reference import relative_error


class Network(nn.Module):
    def __init__(self, conv: nn.Conv2d, pad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.conv = conv
        self.pad = pad
        self.register_buffer("mean", torch.rand(conv.out_channels))
        self.register_buffer("var", torch.rand(conv.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad)
        return F.relu(F.batch_norm(self.conv(x), self.mean, self.var))


NETWORKS = {
    "plain": (lambda: Network(nn.Conv2d(4, 8, 3)), "conv + norm + relu"),
    "groups": (lambda: Network(nn.Conv2d(4, 8, 3, groups=2)), "conv + norm + relu"),
    "same": (lambda: Network(nn.Conv2d(4, 8, 4, padding="same")), "conv + norm + relu"),
    "pad": (lambda: Network(nn.Conv2d(4, 8, 3, padding=1), (1, 2, 0, 1)), "pad + conv + norm + relu"),
    "pad_and_same": (lambda: Network(nn.Conv2d(4, 8, 3, padding="same"), (1, 2, 0, 1)), "conv + norm + relu"),
    "crop": (lambda: Network(nn.Conv2d(4, 8, 3, padding=1), (-1, 2, 0, 1)), "conv + norm + relu"),
    "reflect": (lambda: Network(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")), "conv"),
    "size_decides": (
        lambda: Network(pytest.importorskip("timm").layers.Conv2dSame(4, 8, 3, stride=2)),
        "conv",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_and_functions_in_one_group(name: str) -> None:
    make, parts = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    fused = fused_cna.fuse(network)
    x = torch.randn(2, 4, 9, 10)
    with torch.no_grad():
        assert relative_error(fused(x), network(x).double()) < 1e-6
    (layer,) = fused.__dict__["_fused_cna_record"].layers
    assert layer.parts == parts
    assert bool(layer.reason) == (parts == "conv")
