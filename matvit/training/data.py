"""Training pictures on the device: decoded once, cropped and augmented there.

A picture is kept as a square of 8-bit pixels together with its true aspect ratio, so that random
crops are drawn in the picture's own geometry and nothing at its sides is lost.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from matvit.datasets import LabelledImages
from matvit.errors import DatasetError, ImageError
from matvit.preprocess import open_image
from matvit.progress import Progress, ProgressEvent
from matvit.threads import usable_cores
from matvit.training.memory import room_for
from matvit.training.recipe import Augmentation


@dataclass(frozen=True, kw_only=True)
class DeviceImages:
    """N labelled pictures in device memory."""

    pixels: Tensor  # (N, 3, R, R) uint8, squeezed to a square
    aspect: Tensor  # (N,) float32, width / height
    labels: Tensor  # (N,) int64
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A picture that cannot be read and is not trained on."""

    origin: str
    reason: str


def to_device(
    images: LabelledImages, *, resolution: int, device: torch.device, processes: int = 1, progress: Progress
) -> tuple[DeviceImages, LabelledImages, list[Skipped]]:
    """Decode all pictures to `resolution` pixels a side: the readable ones, decoded and as given, and the others.

    `processes` share the cores, each decoding on its own. Raises DatasetError when none can be read.
    """
    room = partial(
        room_for,
        f"its {len(images)} pictures of {resolution} pixels a side do not fit into memory",
        where=images.name,
        fix="lower its resolution in the recipe",
        error=DatasetError,
    )
    with room():
        pixels = np.empty((len(images), 3, resolution, resolution), dtype=np.uint8)  # as on the device: copied once
    aspect = np.empty(len(images), dtype=np.float32)

    def decode(index: int) -> str | None:
        try:
            image = open_image(images.images[index], draft_size=2 * resolution)
        except ImageError as error:
            return error.what
        aspect[index] = image.width / image.height
        squeezed = np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))  # (R, R, 3)
        pixels[index] = squeezed.transpose(2, 0, 1)
        return None

    skipped: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, usable_cores() // processes)) as pool:
        for index, reason in enumerate(pool.map(decode, range(len(images)))):
            if reason is not None:
                skipped[index] = reason
            if (done := index + 1) % 1000 == 0 or done == len(images):
                note = f"{len(skipped)} skipped" if skipped else ""
                stage = f"decode {images.name}"
                progress(ProgressEvent(stage=stage, done=done, total=len(images), unit="pictures", note=note))
    if skipped:
        readable = [index for index in range(len(images)) if index not in skipped]
        if not readable:
            what = f"none of its {len(images)} pictures can be read"
            raise DatasetError(what=what, where=images.name, fix="give pictures that can be opened")
        for index, row in enumerate(readable):  # in place: a copy would be as large
            pixels[index] = pixels[row]
        pixels, aspect, kept = pixels[: len(readable)], aspect[readable], _only(images, readable)
    else:
        kept = images
    with room():
        on_device = torch.from_numpy(pixels).to(device)
    decoded = DeviceImages(
        pixels=on_device,
        aspect=torch.from_numpy(aspect).to(device),
        labels=torch.from_numpy(kept.labels).to(device),
        num_classes=len(images.class_names),
    )
    return decoded, kept, [Skipped(origin=images.origins[index], reason=why) for index, why in skipped.items()]


def _only(images: LabelledImages, rows: list[int]) -> LabelledImages:
    return replace(
        images,
        labels=images.labels[rows],
        images=[images.images[row] for row in rows],
        origins=[images.origins[row] for row in rows],
    )


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
