"""How each network of the zoo is built, without downloads, and the small images that it is content with."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAMES = tuple((Path(__file__).parent / "networks.txt").read_text().split())
LIBRARIES = {"tv": "torchvision", "tvseg": "torchvision", "tvdet": "torchvision", "timm": "timm"}
IMAGES = 4


@dataclass(frozen=True)
class Entry:
    """A network, and what it is run on."""

    name: str
    build: Callable[[], nn.Module]
    """Uses torch's global random numbers."""
    size: int = 64
    """Height and width of the square images it is calibrated, fused and compared with."""
    other_size: tuple[int, int] | None = (72, 88)
    """Images of another size, which the fused network must take as well; None if the network does not."""
    takes_list: bool = False
    """Whether it takes a list of images, as torchvision's detectors do."""
    probes: tuple[str, ...] = ()
    """Modules whose results are compared besides the network's own."""
    replayed: tuple[str, ...] = ()
    """Modules whose results feed a discontinuous step, such as sorting boxes.

    The compared runs go on with what they returned in the original's first run, so that the rounding errors
    of what they compute do not decide which boxes are left.
    """


@dataclass(frozen=True)
class _Special:
    """What a network needs beyond its family's defaults."""

    options: dict[str, Any] = field(default_factory=dict)
    size: int = 64
    other_size: tuple[int, int] | None = (72, 88)


def _fixed(size: int, **options: Any) -> _Special:
    return _Special(options, size, None)


_SPECIAL = {
    # Attention with positions for one size of image.
    "timm/eca_botnext26ts_256": _fixed(64, img_size=64),
    "timm/efficientformerv2_s0": _fixed(64, img_size=64),
    "timm/levit_conv_128": _fixed(64, img_size=64),
    "timm/visformer_tiny": _fixed(64, img_size=64),
    "timm/vit_small_r26_s32_224": _fixed(64, img_size=64),
    "tv/vit_b_16": _fixed(64, image_size=64),
    "tv/vit_b_32": _fixed(64, image_size=64),
    "tv/vit_h_14": _fixed(56, image_size=56),
    "tv/vit_l_16": _fixed(64, image_size=64),
    "tv/vit_l_32": _fixed(64, image_size=64),
    # Windows and halos that must divide what is left of the image.
    "timm/halonet26t": _fixed(256),
    "tv/maxvit_t": _fixed(224, input_size=(224, 224)),
    # Branches of several strides, added up.
    "timm/dla34": _Special(other_size=(96, 128)),
    "timm/dla60_res2net": _Special(other_size=(96, 128)),
    "timm/dla60x": _Special(other_size=(96, 128)),
    "timm/hrnet_w32": _Special(other_size=(96, 128)),
    "timm/resnetaa50": _Special(other_size=(96, 128)),
    # Stems without padding, which leave less than a filter of 64 pixels.
    "timm/inception_v3": _Special(size=96, other_size=(107, 90)),
    "timm/inception_v4": _Special(size=96, other_size=(107, 90)),
    "tv/inception_v3": _Special({"init_weights": False}, size=96, other_size=(107, 90)),
    # Their own initialisation takes minutes and is replaced by the calibration anyway.
    "tv/googlenet": _Special({"init_weights": False}),
}

_RPN, _BOXES = "rpn", "roi_heads.box_predictor"
_TWO_STAGES = ("backbone", "rpn.head", _BOXES)
_PROBES = {
    "fasterrcnn": _TWO_STAGES,
    "maskrcnn": (*_TWO_STAGES, "roi_heads.mask_predictor"),
    "keypointrcnn": (*_TWO_STAGES, "roi_heads.keypoint_predictor"),
}
_ONE_STAGE = ("backbone", "head")

# Which detectors have frozen norms in the backbone, and their eps, once pretrained weights are asked for.
_FROZEN_EPS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_resnet50_fpn": 0.0,
    "fcos_resnet50_fpn": 1e-5,
    "keypointrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn": 0.0,
}


def entry(name: str) -> Entry:
    """The network called `name`, as networks.txt writes it; LookupError for any other name."""
    if name not in NAMES:
        raise LookupError(f"no network {name!r} in networks.txt, which has {len(NAMES)} such as {NAMES[0]!r}")
    library, short = name.split("/")
    special = _SPECIAL.get(name, _Special())
    if library == "tvdet":
        return _detector(name, short)
    options = dict(special.options)
    if library == "tvseg":
        options["weights_backbone"] = None
    return Entry(name, lambda: _create(library, short, options), special.size, special.other_size)


def _create(library: str, short: str, options: dict[str, Any]) -> nn.Module:
    if library == "timm":
        return importlib.import_module("timm").create_model(short, pretrained=False, **options)
    return importlib.import_module("torchvision.models").get_model(short, weights=None, **options)


def _detector(name: str, short: str) -> Entry:
    """A detector that keeps a few boxes of any score, since random weights are sure of nothing."""
    options: dict[str, Any] = {"weights_backbone": None}
    if short.startswith("ssd"):
        options.update(score_thresh=0.0, topk_candidates=20)
    else:
        # Images are resized to these limits, 800 and 1333 by default.
        options.update(min_size=96, max_size=160)
        if short.startswith(("fcos", "retinanet")):
            options.update(score_thresh=0.0, topk_candidates=20)
        else:
            options.update(rpn_post_nms_top_n_test=20, box_score_thresh=0.0, box_detections_per_img=5)
    two_stages = _PROBES.get(short.split("_")[0])

    def build() -> nn.Module:
        network = _create("tvdet", short, options)
        if short in _FROZEN_EPS:
            _freeze_norms(network.backbone, _FROZEN_EPS[short])
        return network

    return Entry(
        name,
        build,
        size=96,
        other_size=(96, 120),
        takes_list=True,
        probes=two_stages or _ONE_STAGE,
        replayed=(_RPN, _BOXES) if two_stages else ("head",),
    )


def _freeze_norms(backbone: Any, eps: float) -> None:
    frozen_norm = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, frozen_norm(child.num_features, eps))


def arguments_of(which: Entry, size: tuple[int, int], images: int = IMAGES) -> tuple[Any, ...]:
    """Random images as the network's arguments, the same in every call; a detector takes them in [0, 1].

    Blotches under noise: of noise alone, deep layers see hardly more than its mean, and what they make of the
    rest is rounding errors.
    """
    generator = torch.Generator().manual_seed(images * size[0] + size[1])
    blotches = torch.randn(images, 3, 4, 4, generator=generator)
    x = F.interpolate(blotches, size=size, mode="bicubic") + 0.3 * torch.randn(
        images, 3, *size, generator=generator
    )
    return (list(torch.sigmoid(x)),) if which.takes_list else (x,)
