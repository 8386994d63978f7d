"""``strict=True``: an error wherever something looks fusible and is not fused."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from fused_cna import FusionError, fuse
from tests.verified_networks import InPython, image, network


class Doubled(nn.Module):
    """A convolution whose result is normalised, and used besides."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(x)
        return self.last(self.norm(y) * y)


def test_strict_names_what_looks_fusible_and_nothing_else() -> None:
    plain = network(Doubled)
    assert fuse(plain) is not plain
    message = (
        r"but 1 convolution of Doubled looks fusible and is not .*:\n  gate: its result goes to 2 places"
    )
    with pytest.raises(FusionError, match=message) as raised:
        fuse(plain, strict=True, inplace=True)
    assert "last" not in str(raised.value)
    assert type(plain) is Doubled
    fuse(network(), strict=True)


class Pair(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Doubled(), Doubled()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_strict_names_all() -> None:
    with pytest.raises(FusionError, match=r"but 2 convolutions of Pair look .*:\n  a\.gate: .*\n  b\.gate: "):
        fuse(network(Pair), strict=True)


def test_strict_without_inputs_says_that_they_help() -> None:
    plain = network(InPython)
    plain.first, plain.second = nn.Identity(), nn.Identity()
    with pytest.raises(
        FusionError, match=r"cannot follow all of InPython .*; pass example_inputs=\(\.\.\.\)"
    ):
        fuse(plain, strict=True)
    fuse(plain, strict=True, example_inputs=image())
