"""The networks whose convolutions are suites: instantiated without data, or read from a record of that.

Written by `python -m bench.networks`: data/networks.csv, for machines that lack the libraries.
"""

import csv
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from bench.dataflow import convolutions, distinct
from bench.layer_list import Layer

RECORD = Path(__file__).parent / "data" / "networks.csv"
COLUMNS = tuple(name for name in Layer.__dataclass_fields__ if name not in ("models", "role"))


@dataclass(frozen=True)
class Network:
    """A network of a library at its usual image size, and what makes it worth measuring."""

    summary: str
    library: str
    build: Callable[[], nn.Module]
    image: tuple[int, int] = (224, 224)


def torchvision_network(name: str, **options: object) -> Callable[[], nn.Module]:
    """What builds a network of torchvision with random weights."""
    return lambda: importlib.import_module("torchvision.models").get_model(name, weights=None, **options)


def timm_network(name: str, **options: object) -> Callable[[], nn.Module]:
    """What builds a network of timm with random weights."""
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, **options)


NETWORKS = {
    "resnet50": Network(
        "torchvision resnet50 at 224: bottlenecks", "torchvision", torchvision_network("resnet50")
    ),
    "mobilenet_v2": Network(
        "torchvision mobilenet_v2 at 224: depthwise, ReLU6",
        "torchvision",
        torchvision_network("mobilenet_v2"),
    ),
    "efficientnet_b0": Network(
        "torchvision efficientnet_b0 at 224: depthwise, squeeze-excite, SiLU",
        "torchvision",
        torchvision_network("efficientnet_b0"),
    ),
    "regnet_y": Network(
        "torchvision regnet_y_1_6gf at 224: grouped, squeeze-excite",
        "torchvision",
        torchvision_network("regnet_y_1_6gf"),
    ),
    "resnext50": Network(
        "torchvision resnext50_32x4d at 224: 32 groups", "torchvision", torchvision_network("resnext50_32x4d")
    ),
    "yolo": Network(
        "timm cspdarknet53 with SiLU at 640: large images, activation then add",
        "timm",
        timm_network("cspdarknet53", act_layer=nn.SiLU, num_classes=0),
        (640, 640),
    ),
    "vgg16_bn": Network(
        "torchvision vgg16_bn at 224: plain 3x3", "torchvision", torchvision_network("vgg16_bn")
    ),
    "segmentation": Network(
        "torchvision deeplabv3_resnet50 at 520: dilated",
        "torchvision",
        torchvision_network("deeplabv3_resnet50", weights_backbone=None, aux_loss=False),
        (520, 520),
    ),
}


def source_of(name: str) -> str:
    """Where the layers of a network come from here: the library and its version, or the record."""
    library = NETWORKS[name].library
    if importlib.util.find_spec(library) is None:
        return f"data/{RECORD.name}, as {library} is not installed here"
    return f"{library} {importlib.import_module(library).__version__}"


@cache
def layers_of_network(name: str) -> tuple[Layer, ...]:
    """The distinct convolutions of a network with their uses, in the order in which they first run."""
    if importlib.util.find_spec(NETWORKS[name].library) is None:
        return recorded(name)
    return instantiated(name)


def instantiated(name: str) -> tuple[Layer, ...]:
    """The layers by running the network on the meta device."""
    network = NETWORKS[name]
    try:
        with torch.device("meta"):
            module = network.build()
    except (RuntimeError, NotImplementedError):
        # Some networks compute their widths with tensors, which needs values.
        module = network.build().to("meta")
    return tuple(distinct(convolutions(module.eval(), network.image)))


def recorded(name: str, path: Path = RECORD) -> tuple[Layer, ...]:
    """The layers as they were when the record was written; LookupError if it has none for `name`."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == name]
    if not rows:
        raise LookupError(f"{path.name} has no rows for {name!r}; write it anew: python -m bench.networks")
    return tuple(_parse(row) for row in rows)


def _parse(row: dict[str, str]) -> Layer:
    words = {name: row[name] for name in ("norm", "act", "residual")}
    numbers = {name: int(row[name]) for name in COLUMNS if name not in (*words, "conv_bias")}
    return Layer(**words, **numbers, conv_bias=row["conv_bias"] == "1", models=1, role="")  # type: ignore[arg-type]


def write_record(path: Path = RECORD) -> None:
    """Instantiate every network and write its layers, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("suite", *COLUMNS))
        for name in NETWORKS:
            for layer in instantiated(name):
                values = asdict(layer)
                writer.writerow((name, *(_number(values[column]) for column in COLUMNS)))


def _number(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


if __name__ == "__main__":
    write_record()
