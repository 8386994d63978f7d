"""Real images without a download: the photographs inside scikit-learn, cropped and scaled into batches."""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALLEST_CROP = 96


def photographs() -> list[Tensor]:
    """china.jpg and flower.jpg as float32 (1, 3, 427, 640) in 0..1."""
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    return [image.permute(2, 0, 1).unsqueeze(0).float() / 255 for image in images]


def crops(images: list[Tensor], batch: int, size: int, seed: int) -> Tensor:
    """`batch` square crops (batch, 3, size, size), normalised as for ImageNet.

    Each takes the next photograph at a random place and scale, every other one mirrored.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    taken = []
    for index in range(batch):
        image = images[index % len(images)]
        height, width = image.shape[-2:]
        side = _random_integer(SMALLEST_CROP, min(height, width), generator)
        top = _random_integer(0, height - side, generator)
        left = _random_integer(0, width - side, generator)
        crop = image[:, :, top : top + side, left : left + side]
        scaled = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mirrored = scaled.flip(-1) if (index // len(images)) % 2 else scaled
        taken.append((mirrored - mean) / std)
    return torch.cat(taken)


def _random_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Between `low` and `high`, both possible."""
    return int(torch.randint(low, high + 1, (), generator=generator))
