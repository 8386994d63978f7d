"""What the job models measures: whole networks with random weights, and the images that go in."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks import NETWORKS, timm_network, torchvision_network
from bench.photographs import crops, photographs
from bench.pipeline import CALIBRATION_SEED, calibrate
from bench.setting import PRECISIONS, Setting
from bench.timing import InputSets

CALIBRATION_BATCHES = 2
CALIBRATION_IMAGES = 4
FEWEST_INPUT_SETS = 2
FEWEST_IMAGES = 4
IMAGE_SHAPE = (427, 640)


class Segmenter(nn.Module):
    """A torchvision segmentation network, which returns a dictionary, as one that returns class logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)["out"]
        return logits


class DenseDetector(nn.Module):
    """A torchvision one-stage detector up to the tensors that its boxes are chosen from.

    What is left out, scaling the images and choosing boxes, has no convolution, and with random weights the
    number of boxes would depend on roundings. The result is [N, K, anchors], classes first.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        pyramid = list(self.network.backbone(x).values())  # type: ignore[operator]
        heads = self.network.head(pyramid)  # type: ignore[operator]
        return torch.cat(list(heads.values()), dim=-1).transpose(1, 2)


def _itself(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Model:
    """A network, and how to call it for one tensor. The first `classes` channels of that are class logits.

    Images are square, of `size_on_gpu` and `size_on_cpu` pixels.
    """

    summary: str
    library: str
    build: Callable[[], nn.Module]
    size_on_gpu: int = 224
    size_on_cpu: int = 224
    answers: Callable[[nn.Module], nn.Module] = _itself
    classes: int | None = None

    def size(self, device: torch.device) -> int:
        return self.size_on_gpu if device.type == "cuda" else self.size_on_cpu


def _classifier(name: str, kind: str) -> Model:
    return Model(f"torchvision {name}: {kind}", "torchvision", torchvision_network(name))


def _fcos() -> nn.Module:
    network = torchvision_network("fcos_resnet50_fpn", weights_backbone=None)()
    # Its start value, the logit of 1 %, is ten times the logits of random weights and would hide errors.
    nn.init.zeros_(network.head.classification_head.cls_logits.bias)  # type: ignore[union-attr, arg-type]
    return network


MODELS = {
    "resnet50": _classifier("resnet50", "bottlenecks"),
    "mobilenet_v2": _classifier("mobilenet_v2", "depthwise, ReLU6"),
    "efficientnet_b0": _classifier("efficientnet_b0", "depthwise, squeeze-excite, SiLU"),
    "mobilenet_v3_large": _classifier("mobilenet_v3_large", "depthwise, squeeze-excite, Hardswish"),
    "regnet_y_1_6gf": _classifier("regnet_y_1_6gf", "grouped, squeeze-excite"),
    "resnext50_32x4d": _classifier("resnext50_32x4d", "32 groups"),
    "densenet121": _classifier("densenet121", "norm before convolution"),
    "cspdarknet53": Model(
        "timm cspdarknet53: LeakyReLU, activation then add",
        "timm",
        timm_network("cspdarknet53"),
        size_on_gpu=256,
        size_on_cpu=256,
    ),
    "deeplabv3_resnet50": Model(
        "torchvision deeplabv3_resnet50: dilated segmenter",
        "torchvision",
        NETWORKS["segmentation"].build,
        size_on_gpu=520,
        answers=Segmenter,
    ),
    "fcos_resnet50_fpn": Model(
        "torchvision fcos_resnet50_fpn: detector, up to its box candidates",
        "torchvision",
        _fcos,
        size_on_gpu=640,
        answers=DenseDetector,
        classes=91,
    ),
}


@dataclass(frozen=True)
class Goal:
    """How many times faster than the faster eager layout a frozen network is to be on a CPU, in float32."""

    network: str
    batch: int
    speedup: float


GOALS = (
    Goal("resnet50", 1, 1.5),
    Goal("mobilenet_v2", 8, 1.9),
    Goal("efficientnet_b0", 8, 1.5),
)
CPU_BATCHES = (1, 8)
GPU_BATCHES = (32, 1)


@dataclass(frozen=True)
class Case:
    """A network at a batch and a precision."""

    network: str
    batch: int
    precision: str

    @property
    def name(self) -> str:
        """Also the key by which a case is found again in a file."""
        return f"{self.network} n{self.batch} {self.precision}"

    @property
    def model(self) -> Model:
        return MODELS[self.network]

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision].dtype

    @property
    def has_goal(self) -> bool:
        return any((goal.network, goal.batch) == (self.network, self.batch) for goal in GOALS)


def planned_cases(setting: Setting) -> list[Case]:
    """All that is to be measured, most telling first.

    Batches that were not asked for are, on a GPU, 32 and 1. On a CPU they are those of the goals, then 1 for
    the other networks, then the other ones of 1 and 8 for the networks that have a goal.
    """
    networks = setting.networks or tuple(MODELS)
    if setting.batches or setting.device.type == "cuda":
        pairs = [(name, batch) for batch in setting.batches or GPU_BATCHES for name in networks]
    else:
        of_goals = {goal.network: goal.batch for goal in GOALS}
        pairs = [(name, of_goals.get(name, CPU_BATCHES[0])) for name in networks]
        pairs.sort(key=lambda pair: pair[0] not in of_goals)
        pairs += [
            (name, batch) for name in networks for batch in CPU_BATCHES if of_goals.get(name, batch) != batch
        ]
    return [Case(name, batch, setting.precision.name) for name, batch in pairs]


def why_not_installed(case: Case) -> str | None:
    """What to install before the network can be built; None if nothing."""
    library = case.model.library
    if importlib.util.find_spec(library) is not None:
        return None
    return f"{library} is not installed here (pip install {library})"


@dataclass(frozen=True)
class Images:
    """What crops are taken from, [1, 3, H, W] in 0..1, and what that is in words."""

    pictures: list[Tensor]
    source: str


def images_here(seed: int) -> Images:
    """Photographs where scikit-learn is, which brings them; else smooth noise."""
    if importlib.util.find_spec("sklearn") is not None:
        return Images(photographs(), "photographs")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, *(length // 16 for length in IMAGE_SHAPE), generator=generator)
    smooth = F.interpolate(coarse, IMAGE_SHAPE, mode="bicubic", align_corners=False).clamp(0, 1)
    return Images(
        [picture.unsqueeze(0) for picture in smooth],
        "smooth noise, as scikit-learn, which brings photographs, is not installed here "
        "(pip install scikit-learn)",
    )


def build(case: Case, images: Images, setting: Setting) -> nn.Module:
    """The network of a case on the device, in eval mode and in the dtype, without gradients.

    Weights are random. So are the scales and shifts of the batch norms, whose statistics are then those of
    some images: whatever is left out of a fused group shows in the result.
    """
    torch.manual_seed(setting.seed)
    network = case.model.build().eval().requires_grad_(False).to(setting.device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    size = case.model.size(setting.device)
    batches = [
        crops(images.pictures, CALIBRATION_IMAGES, size, CALIBRATION_SEED + setting.seed + index)
        for index in range(CALIBRATION_BATCHES)
    ]
    calibrate(case.model.answers(network), [batch.to(setting.device) for batch in batches])
    return network.to(case.dtype)


def input_sets_of(case: Case, images: Images, setting: Setting) -> InputSets:
    """Different batches of crops, contiguous: two, or more so that at least four images are seen."""
    count = max(FEWEST_INPUT_SETS, -(-FEWEST_IMAGES // case.batch))
    size = case.model.size(setting.device)
    return [
        (crops(images.pictures, case.batch, size, setting.seed + index).to(setting.device, case.dtype),)
        for index in range(count)
    ]
