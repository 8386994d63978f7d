"""The layers that are measured: rows of data/conv_layers.csv, chosen by rule."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "conv_layers.csv"
RULE = (
    "for each role, of the rows of conv_layers.csv that match its columns and occur in at least two "
    "networks, the one with the most uses"
)
FUSED_NORMS = ("BatchNorm2d", "FrozenBatchNorm2d")


@dataclass(frozen=True)
class Layer:
    """One convolution of real networks with what follows it. Sizes as in the csv; h and w are the input's.

    A frozen batch norm computes what a batch norm does in eval mode and is measured as one. Any other norm
    (layer norm) is not part of the fused operator, nor of its rivals: the layer ends at the convolution.
    """

    cin: int
    cout: int
    kh: int
    kw: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int
    h: int
    w: int
    norm: str
    act: str
    residual: str
    conv_bias: bool
    uses: int
    models: int
    role: str

    @property
    def out_h(self) -> int:
        return (self.h + 2 * self.pad_h - self.dil_h * (self.kh - 1) - 1) // self.stride_h + 1

    @property
    def out_w(self) -> int:
        return (self.w + 2 * self.pad_w - self.dil_w * (self.kw - 1) - 1) // self.stride_w + 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups, in the order in which torch's convolutions take them."""
        pairs = ((self.stride_h, self.stride_w), (self.pad_h, self.pad_w), (self.dil_h, self.dil_w))
        return (*pairs, self.groups)

    @property
    def has_norm(self) -> bool:
        return self.norm in FUSED_NORMS

    @property
    def residual_order(self) -> str | None:
        """'add_act', 'act_add', or None where nothing is added."""
        return None if self.residual == "none" else self.residual

    @property
    def depthwise(self) -> bool:
        return self.groups == self.cin > 1

    @property
    def name(self) -> str:
        """Stable and readable, made from the shape: '3x3 s2 128 @56 BN ReLU'."""
        grouping = "dw " if self.depthwise else ""
        grouped = f" g{self.groups}" if self.groups > 1 and not self.depthwise else ""
        stride = f" s{self.stride_h}" if max(self.stride_h, self.stride_w) > 1 else ""
        dilation = f" d{self.dil_h}" if max(self.dil_h, self.dil_w) > 1 else ""
        channels = str(self.cin) if self.cin == self.cout else f"{self.cin}->{self.cout}"
        activation = "" if self.act == "none" else self.act
        order = {"add_act": ("add", activation), "act_add": (activation, "add")}.get(
            self.residual, (activation,)
        )
        words = ("bias" if self.conv_bias else "", "BN" if self.has_norm else "", *order)
        tail = " ".join(word for word in words if word)
        return (
            f"{grouping}{self.kh}x{self.kw}{stride}{dilation}{grouped} {channels} @{self.h} {tail}".rstrip()
        )


@dataclass(frozen=True)
class Role:
    """What a measured layer stands for, and the csv columns that its row must have."""

    name: str
    columns: dict[str, str]


def _role(name: str, kind: str, **columns: str | int) -> Role:
    return Role(name, {"kind": kind, **{column: str(value) for column, value in columns.items()}})


# The first of each kind come first: a run cut short by its budget, and the quick suite, then cover all kinds.
ROLES = (
    _role(
        "3x3 of a bottleneck",
        "kxk dense",
        kh=3,
        stride_h=1,
        dil_h=1,
        h=14,
        norm="BatchNorm2d",
        residual="none",
    ),
    _role("1x1 that narrows", "1x1 dense", stride_h=1, h=14, norm="BatchNorm2d", act="ReLU", residual="none"),
    _role(
        "1x1 that widens and adds",
        "1x1 dense",
        stride_h=1,
        h=14,
        norm="BatchNorm2d",
        act="ReLU",
        residual="add_act",
    ),
    _role("depthwise 3x3", "depthwise", kh=3, stride_h=1, norm="BatchNorm2d", act="SiLU", h=14),
    _role("depthwise 5x5", "depthwise", kh=5, stride_h=1, norm="BatchNorm2d", act="ReLU"),
    _role("grouped 3x3", "grouped", kh=3, stride_h=1, norm="BatchNorm2d", act="ReLU", residual="none"),
    _role("stem 3x3", "kxk dense", cin=3, kh=3, stride_h=2, norm="BatchNorm2d", act="ReLU"),
    _role("squeeze-excite, narrow", "1x1 dense", h=1, act="SiLU", norm="none"),
    _role("squeeze-excite, widen", "1x1 dense", h=1, act="Sigmoid", norm="none"),
    _role("dilated 3x3", "kxk dense", kh=3, dil_h=2, norm="BatchNorm2d", act="ReLU"),
    _role("depthwise 7x7", "depthwise", kh=7, stride_h=1),
    _role("stem 7x7", "kxk dense", cin=3, kh=7, stride_h=2, norm="BatchNorm2d", act="ReLU"),
    _role(
        "strided 1x1 that adds", "1x1 dense", stride_h=2, norm="BatchNorm2d", act="ReLU", residual="add_act"
    ),
    _role("strided 3x3", "kxk dense", kh=3, cin=128, stride_h=2, norm="BatchNorm2d", act="ReLU"),
    _role(
        "3x3 on a large image",
        "kxk dense",
        kh=3,
        stride_h=1,
        h=56,
        norm="BatchNorm2d",
        act="ReLU",
        residual="none",
    ),
    _role("3x3 that adds", "kxk dense", kh=3, stride_h=1, norm="BatchNorm2d", act="ReLU", residual="add_act"),
    _role(
        "3x3 on a small image",
        "kxk dense",
        kh=3,
        stride_h=1,
        h=7,
        norm="BatchNorm2d",
        act="ReLU",
        residual="none",
    ),
    _role(
        "1x1 on a large image",
        "1x1 dense",
        stride_h=1,
        h=56,
        norm="BatchNorm2d",
        act="ReLU",
        residual="add_act",
    ),
    _role("1x1 of an inverted bottleneck, in", "1x1 dense", h=56, norm="BatchNorm2d", act="ReLU6"),
    _role(
        "1x1 of an inverted bottleneck, out",
        "1x1 dense",
        h=7,
        norm="BatchNorm2d",
        act="none",
        residual="add_act",
    ),
    _role("depthwise 3x3 on a large image", "depthwise", kh=3, stride_h=1, h=112, norm="BatchNorm2d"),
    _role("strided depthwise 3x3", "depthwise", kh=3, stride_h=2, norm="BatchNorm2d", act="ReLU6"),
    _role("1x1 with Hardswish", "1x1 dense", norm="BatchNorm2d", act="Hardswish"),
    _role("1x1 with GELU", "1x1 dense", h=14, norm="none", act="GELU"),
    _role("7x1", "kxk dense", kh=7, kw=1, norm="BatchNorm2d"),
    _role("3x3, activation then add", "kxk dense", kh=3, residual="act_add"),
    _role("bare 3x3", "kxk dense", kh=3, h=14, norm="none", act="none", residual="none", conv_bias=0),
)


@cache
def read_rows(path: Path = DATA) -> tuple[dict[str, str], ...]:
    """The rows of the csv as they stand."""
    with path.open(newline="") as file:
        return tuple(csv.DictReader(file))


def select(role: Role, rows: Iterable[dict[str, str]]) -> Layer:
    """The row for `role` by RULE; LookupError if none matches."""
    matching = [
        row
        for row in rows
        if int(row["models"]) >= 2 and all(row[column] == value for column, value in role.columns.items())
    ]
    if not matching:
        raise LookupError(f"no row of conv_layers.csv matches the role {role.name!r}: {role.columns}")
    return parse(max(matching, key=lambda row: int(row["uses"])), role.name)


def parse(row: dict[str, str], role: str) -> Layer:
    """A csv row as a Layer."""
    values: dict[str, Any] = {name: row[name] for name in ("norm", "act", "residual")}
    values |= {name: int(value) for name, value in row.items() if name not in (*values, "kind", "conv_bias")}
    return Layer(**values, conv_bias=row["conv_bias"] == "1", role=role)


@cache
def layers_of_roles() -> tuple[Layer, ...]:
    """One layer for each role, in the order of ROLES."""
    return tuple(select(role, read_rows()) for role in ROLES)
