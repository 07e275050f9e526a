"""Crops and colours of training pictures, drawn on the device.

Letters in shape comments: B pictures, R pixels a side of what is kept of one, see `matvit.training.data`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from matvit.training.recipe import Augmentation


def random_crops(aspect: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Boxes (B, 4) as left, top, width, height in [0, 1], mirrored ones with negative width.

    Drawn like torchvision's RandomResizedCrop in the picture's geometry, but clamped to the picture
    where that would try again.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(aspect), generator=generator, device=aspect.device) * (high - low) + low

    area = uniform(*augmentation.scale) * aspect  # pictures are `aspect` wide and 1 high
    ratio = uniform(math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])).exp()
    width = ((area * ratio).sqrt() / aspect).clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
    mirrored = uniform(0, 1) < 0.5
    return torch.stack(
        [torch.where(mirrored, left + width, left), top, torch.where(mirrored, -width, width), height], 1
    )


def cut(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of (B, 3, R, R) uint8 by `boxes` (B, 4) -> (B, 3, size, size) float32 in [0, 1]."""
    left, top, width, height = boxes.unbind(1)
    theta = torch.zeros(len(boxes), 2, 3, device=boxes.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height  # grid coordinates run from -1 to 1
    theta[:, 0, 2], theta[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(boxes), 3, size, size], align_corners=False)
    return F.grid_sample(pixels.float() / 255, grid, align_corners=False, padding_mode="reflection")


def colour_jitter(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation and grey pictures: (B, 3, H, W) in [0, 1], shape kept."""

    def factor() -> Tensor:
        noise = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) * 2 - 1
        return 1 + augmentation.colour_jitter * noise

    images = images * factor()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean
    grey = images.mean(dim=1, keepdim=True)
    keep = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) >= augmentation.grayscale
    return ((images - grey) * factor() * keep + grey).clamp(0, 1)
