"""The network that a worker serves, and what makes its input of an image."""

import importlib
from collections.abc import Callable

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import fused_cna

Transform = Callable[[Image.Image], Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str) -> tuple[nn.Module, Transform]:
    """A torchvision network with its default weights and transform, or what ``module:function`` returns."""
    module, _, function = name.partition(":")
    if function:
        return getattr(importlib.import_module(module), function)()
    weights = torchvision.models.get_model_weights(name).DEFAULT
    return torchvision.models.get_model(name, weights=weights), weights.transforms()


def fused(network: nn.Module) -> nn.Module:
    """The network in eval mode, on the GPU where there is one, in channels_last, fused."""
    return fused_cna.fuse(network.eval().to(DEVICE, memory_format=torch.channels_last))


@torch.inference_mode()
def classify(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """For images [N, C, H, W] the most likely classes [N] and their probabilities [N], on the CPU."""
    images = images.to(DEVICE, memory_format=torch.channels_last)
    probabilities, classes = network(images).softmax(1).max(1)
    return classes.cpu(), probabilities.float().cpu()
