"""The networks that are measured, with random weights, and the photographs that go in."""

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import PRECISIONS
from fused_cna._device_timer import no_search

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_CROP = 96
CALIBRATION_BATCHES, CALIBRATION_IMAGES, CALIBRATION_SEED = 2, 4, 1000
IMAGES = "photographs: china.jpg and flower.jpg of scikit-learn"


@dataclass(frozen=True)
class Model:
    """A classifier of a library, called with square images of `size` pixels.

    `modules`: it is made of Conv2dNormActivation, each of which a ConvNormAct can take the place of.
    """

    name: str
    kind: str
    library: str = "torchvision"
    size: int = 224
    modules: bool = False

    def why_not(self) -> str | None:
        """What to install before it can be built and called; None if nothing."""
        needed = {self.library: self.library, "sklearn": "scikit-learn"}
        missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
        return (
            f"{', '.join(missing)} not installed here (pip install {' '.join(missing)})" if missing else None
        )

    def build(self) -> nn.Module:
        """The network with random weights."""
        library: Any = importlib.import_module(self.library)
        if self.library == "timm":
            return library.create_model(self.name, pretrained=False)  # type: ignore[no-any-return]
        return library.models.get_model(self.name, weights=None)  # type: ignore[no-any-return]


_ALL = (
    Model("resnet50", "bottlenecks"),
    Model("mobilenet_v2", "depthwise, ReLU6", modules=True),
    Model("efficientnet_b0", "depthwise, squeeze-excite, SiLU", modules=True),
    Model("mobilenet_v3_large", "depthwise, squeeze-excite, Hardswish"),
    Model("regnet_y_1_6gf", "grouped, squeeze-excite"),
    Model("resnext50_32x4d", "32 groups"),
    Model("densenet121", "norm before convolution"),
    Model("cspdarknet53", "LeakyReLU, activation then add", "timm", 256),
)
MODELS = {model.name: model for model in _ALL}
# On a CPU, each at the batch that tells most.
TELLING = {"resnet50": 1, "mobilenet_v2": 8, "efficientnet_b0": 8}
CPU_BATCHES, GPU_BATCHES = (1, 8), (32, 1)
CASES_RULE = (
    "On a GPU each network runs at batch 32, then 1. On a CPU resnet50 runs at batch 1, mobilenet_v2 and "
    "efficientnet_b0 at 8, and in a run of all jobs these three alone; then the others at 1, then these at "
    "their other batch. Under a budget all that need no compiler come before any that do."
)


@dataclass(frozen=True)
class Case:
    """A network at a batch and a precision; its name is the same for the same measurement in every file."""

    model: Model
    batch: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.model.name} n{self.batch} {self.precision}"


def planned_cases(
    networks: Sequence[str], batches: Sequence[int], precision: str, *, gpu: bool, few: bool = False
) -> list[Case]:
    """All that is to be measured, most telling first, by CASES_RULE; `few` for a CPU's TELLING alone."""
    names = networks or tuple(MODELS)
    if batches or gpu:
        pairs = [(name, batch) for batch in batches or GPU_BATCHES for name in names]
    else:
        pairs = [(name, TELLING.get(name, CPU_BATCHES[0])) for name in names if not few or name in TELLING]
        pairs.sort(key=lambda pair: pair[0] not in TELLING)
        others = [(n, b) for n in names if n in TELLING for b in CPU_BATCHES if b != TELLING[n]]
        pairs += [] if few else others
    return [Case(MODELS[name], batch, precision) for name, batch in pairs]


def photographs() -> list[Tensor]:
    """china.jpg and flower.jpg as float32 (1, 3, 427, 640) in 0..1: real images without a download."""
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    return [image.permute(2, 0, 1).unsqueeze(0).float() / 255 for image in images]


def crops(images: Sequence[Tensor], batch: int, size: int, seed: int) -> Tensor:
    """`batch` square crops (batch, 3, size, size), normalised as for ImageNet.

    Each takes the next photograph at a random place and scale, every other one mirrored.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    taken = []
    for index in range(batch):
        image = images[index % len(images)]
        height, width = image.shape[-2:]
        side = between(SMALLEST_CROP, min(height, width))
        top, left = between(0, height - side), between(0, width - side)
        crop = image[:, :, top : top + side, left : left + side]
        scaled = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mirrored = scaled.flip(-1) if (index // len(images)) % 2 else scaled
        taken.append((mirrored - mean) / std)
    return torch.cat(taken)


def build_network(case: Case, images: Sequence[Tensor], device: torch.device, seed: int) -> nn.Module:
    """The network of a case in eval mode and in its dtype, without gradients.

    Weights are random. So are the scales and shifts of the batch norms, whose statistics are then those of
    some images: whatever is left out of a fused group shows in the result.
    """
    torch.manual_seed(seed)
    network = case.model.build().eval().requires_grad_(False).to(device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    seeds = (CALIBRATION_SEED + seed + index for index in range(CALIBRATION_BATCHES))
    calibrate(network, (crops(images, CALIBRATION_IMAGES, case.model.size, one).to(device) for one in seeds))
    return network.to(PRECISIONS[case.precision].dtype)


@no_search()
def calibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every batch norm's running statistics to the mean over `batches`; the network ends in eval mode.

    Only the norms are in training mode: dropout and stochastic depth would falsify the statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def image_sets(case: Case, images: Sequence[Tensor], device: torch.device, seed: int) -> list[Tensor]:
    """Different batches of crops, contiguous: two, or more so that at least four images are seen."""
    count, dtype = max(2, -(-4 // case.batch)), PRECISIONS[case.precision].dtype
    batches = (crops(images, case.batch, case.model.size, seed + index) for index in range(count))
    return [batch.to(device, dtype) for batch in batches]
