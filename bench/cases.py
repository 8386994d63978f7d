"""The layers that are measured: suites of real networks and two sweeps, in precisions and in order."""

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Precision:
    """A storage type and, for float32, how a GPU multiplies it: "tf32" or "ieee"."""

    name: str
    dtype: torch.dtype
    float32_products: str = ""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch's switches, which every route follows, set for the time inside."""
        backends: Any = torch.backends
        switches = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
        before = [switch.fp32_precision for switch in switches]

        def set_all(precisions: Sequence[str]) -> None:
            # The older switches too: whoever reads them gets an error where they disagree with the newer.
            backends.cudnn.allow_tf32 = precisions[0] == "tf32"
            backends.cuda.matmul.allow_tf32 = precisions[2] == "tf32"
            for switch, precision in zip(switches, precisions, strict=True):
                switch.fp32_precision = precision

        if self.float32_products:
            set_all([self.float32_products] * 3)
        try:
            yield
        finally:
            if self.float32_products:
                set_all(before)


PRECISIONS = {
    "fp16": Precision("fp16", torch.float16),
    "bf16": Precision("bf16", torch.bfloat16),
    "tf32": Precision("tf32", torch.float32, "tf32"),
    "fp32": Precision("fp32", torch.float32, "ieee"),
}


@dataclass(frozen=True)
class Layer:
    """One convolution with what follows it. Sizes as in data/conv_layers.csv; h and w are the input's.

    A frozen batch norm is measured as a batch norm in eval mode, which computes the same. Any other norm is
    not part of the fused operator, nor of its rivals: the layer ends at the convolution.
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
    uses: int = 1
    models: int = 1
    role: str = ""

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
        return self.norm in ("BatchNorm2d", "FrozenBatchNorm2d")

    @property
    def residual_order(self) -> str | None:
        """'add_act', 'act_add', or None where nothing is added."""
        return None if self.residual == "none" else self.residual

    @property
    def depthwise(self) -> bool:
        return self.groups == self.cin > 1

    @property
    def name(self) -> str:
        """Made from the shape: '3x3 s2 128 @56 BN ReLU'."""
        act = "" if self.act == "none" else self.act
        words = (
            "dw" if self.depthwise else "",
            f"{self.kh}x{self.kw}",
            f"s{self.stride_h}" if max(self.stride_h, self.stride_w) > 1 else "",
            f"d{self.dil_h}" if max(self.dil_h, self.dil_w) > 1 else "",
            f"g{self.groups}" if self.groups > 1 and not self.depthwise else "",
            str(self.cin) if self.cin == self.cout else f"{self.cin}->{self.cout}",
            f"@{self.h}",
            "bias" if self.conv_bias else "",
            "BN" if self.has_norm else "",
            *{"add_act": ("add", act), "act_add": (act, "add")}.get(self.residual, (act,)),
        )
        return " ".join(word for word in words if word)

    def shapes(self, batch: int) -> list[tuple[int, int, int, int]]:
        """Of x and, where there is one, of the residual."""
        output = (batch, self.cout, self.out_h, self.out_w)
        return [(batch, self.cin, self.h, self.w), *([output] if self.residual_order else [])]

    def flops(self, batch: int) -> int:
        """Two per multiply-add of the convolution; norm, residual and activation are not counted."""
        outputs = batch * self.cout * self.out_h * self.out_w
        return 2 * outputs * (self.cin // self.groups) * self.kh * self.kw

    def least_bytes(self, batch: int, itemsize: int) -> int:
        """Bytes that cannot be avoided: operands read once, the output written once.

        Input rows and columns that no filter tap meets (a strided 1x1) are not counted.
        """
        rows = _touched(self.h, self.out_h, self.stride_h, self.pad_h, self.dil_h, self.kh)
        columns = _touched(self.w, self.out_w, self.stride_w, self.pad_w, self.dil_w, self.kw)
        weight = self.cout * (self.cin // self.groups) * self.kh * self.kw
        outputs = batch * self.cout * self.out_h * self.out_w * (2 if self.residual_order else 1)
        vectors = self.cout * (4 * self.has_norm + self.conv_bias)
        return itemsize * (batch * self.cin * rows * columns + weight + outputs + vectors)


def _touched(size: int, outputs: int, stride: int, pad: int, dilation: int, taps: int) -> int:
    positions = {out * stride - pad + tap * dilation for out in range(outputs) for tap in range(taps)}
    return sum(0 <= position < size for position in positions)


QUICK_COUNT = 8
NETWORKS = {
    "resnet50": "torchvision resnet50 at 224: bottlenecks",
    "mobilenet_v2": "torchvision mobilenet_v2 at 224: depthwise, ReLU6",
    "efficientnet_b0": "torchvision efficientnet_b0 at 224: depthwise, squeeze-excite, SiLU",
    "regnet_y": "torchvision regnet_y_1_6gf at 224: grouped, squeeze-excite",
    "resnext50": "torchvision resnext50_32x4d at 224: 32 groups",
    "yolo": "timm cspdarknet53 with SiLU at 640: large images, activation then add",
    "vgg16_bn": "torchvision vgg16_bn at 224: plain 3x3",
    "segmentation": "torchvision deeplabv3_resnet50 at 520: dilated",
}
SWEPT_FILTERS, SWEPT_WIDTHS = (3, 5, 7, 9, 13, 21, 31), (4, 8, 16, 32, 64)
SWEPT = {
    "depthwise": "filters of 3 to 31 on images of 64 to 4 pixels with 64 to 1024 channels",
    "grouped": "filters of 3 to 31 with 4 to 64 channels in a group, 256 in all, on images of 28 pixels",
}
SUITES = {
    "default": "one layer for each role in data/roles.txt, of 194 networks: the most used that matches",
    "quick": f"the first {QUICK_COUNT} of those",
    **SWEPT,
    **NETWORKS,
}
ORDER_RULE = (
    "Within a network at one batch and precision, layers are ranked by their share of its floor time (uses "
    "times the roofline's time). All first layers are measured, then all second ones, and so on; within a "
    "rank by precision, then batch, then suite, as they were given. Other suites keep their own order. A "
    "layer that several suites have is measured once, when its first turn comes."
)


@cache
def read_rows(name: str = "conv_layers.csv") -> tuple[dict[str, str], ...]:
    """The rows of a csv in data/ as they stand."""
    with (DATA / name).open(newline="") as file:
        return tuple(csv.DictReader(file))


def parse(row: Mapping[str, str], role: str = "") -> Layer:
    """A csv row as a Layer."""
    words: dict[str, Any] = {name: row[name] for name in ("norm", "act", "residual")}
    numbers = {n: int(v) for n, v in row.items() if n not in (*words, "kind", "suite", "conv_bias")}
    return Layer(**words, **numbers, conv_bias=row["conv_bias"] == "1", role=role)


def select(role: str, rows: Iterable[Mapping[str, str]]) -> Layer:
    """The row for a line of roles.txt: of those that match, in at least two networks, the most used."""
    name, kind, columns = (part.strip() for part in role.split("|"))
    wanted = {"kind": kind, **dict(pair.split("=") for pair in columns.split())}
    matching = [row for row in rows if int(row["models"]) >= 2 and wanted.items() <= row.items()]
    if not matching:
        raise LookupError(f"no row of conv_layers.csv matches the role {name!r}: {wanted}")
    return replace(parse(max(matching, key=lambda row: int(row["uses"])), name), uses=1)


def _swept(filter_size: int, channels: int, groups: int, image: int) -> Layer:
    pad = filter_size // 2
    square = (filter_size, filter_size, 1, 1, pad, pad, 1, 1)
    return Layer(channels, channels, *square, groups, image, image, "BatchNorm2d", "ReLU", "none", False)


@cache
def layers_of(suite: str) -> tuple[Layer, ...]:
    """The distinct layers of a suite, in its own order; `uses` is how often it has each."""
    if suite in NETWORKS:
        return tuple(parse(row) for row in read_rows("networks.csv") if row["suite"] == suite)
    if suite == "depthwise":
        return tuple(_swept(k, 4096 // w, 4096 // w, w) for k in SWEPT_FILTERS for w in SWEPT_WIDTHS[::-1])
    if suite == "grouped":
        return tuple(_swept(k, 256, 256 // w, 28) for k in SWEPT_FILTERS for w in SWEPT_WIDTHS)
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    roles = (DATA / "roles.txt").read_text().splitlines()
    chosen = tuple(select(role, read_rows()) for role in roles if not role.startswith("#"))
    return chosen[:QUICK_COUNT] if suite == "quick" else chosen


@dataclass
class Row:
    """A layer at a batch and a precision, measured once. `uses` is how often each suite has it."""

    layer: Layer
    batch: int
    precision: str
    uses: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for the same measurement in every file: every number, whatever the suites."""
        numbers = [v for n, v in asdict(self.layer).items() if n not in ("uses", "models", "role")]
        return f"{self.precision} n{self.batch} " + " ".join(map(str, numbers))

    @property
    def name(self) -> str:
        return f"{self.precision} n{self.batch} {self.layer.name}"

    def floor(self, ceilings: Mapping[str, Any]) -> tuple[float, str]:
        """Seconds that the roofline gives, max(FLOPs / peak, bytes / bandwidth), and which of the two."""
        itemsize = PRECISIONS[self.precision].dtype.itemsize
        matrix = self.layer.flops(self.batch) / ceilings["flops_per_second"]
        memory = self.layer.least_bytes(self.batch, itemsize) / ceilings["bytes_per_second"]
        return (matrix, "matrix") if matrix > memory else (memory, "memory")


def ordered_rows(
    suites: Sequence[str], batches: Sequence[int], ceilings: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """Every row once, by ORDER_RULE. `ceilings` has those of each precision."""
    turns: list[tuple[int, Row]] = []
    for precision, batch, suite in itertools.product(ceilings, batches, suites):
        rows = [Row(one, batch, precision, {suite: one.uses}) for one in layers_of(suite)]
        if suite in NETWORKS:
            rows.sort(key=lambda row: -row.layer.uses * row.floor(ceilings[row.precision])[0])
        turns += enumerate(rows)
    merged: dict[str, Row] = {}
    for _, row in sorted(turns, key=lambda turn: turn[0]):
        merged.setdefault(row.key, row).uses.update(row.uses)
    return list(merged.values())
