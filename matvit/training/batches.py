"""Batches: a function of seed, stage and step alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matvit.training.crops import colour_jitter, cut, random_crops
from matvit.training.data import DeviceImages
from matvit.training.recipe import Augmentation
from matvit.training.teacher import TeacherTargets


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B pictures, those of one data set beside each other."""

    images: Tensor  # (B, 3, R, R) float32 in [0, 1], augmented
    targets: list[Tensor]  # per data set (B_i, C_i) float32: class probabilities
    features: Tensor | None  # (B, E): the teacher's features of the same crops
    probabilities: Tensor | None  # (B, T): the teacher's class probabilities

    def at(self, image_size: int) -> Tensor:
        """The same pictures at another resolution, antialiased: (B, 3, image_size, image_size)."""
        if image_size == self.images.shape[-1]:
            return self.images
        size = (image_size, image_size)
        return F.interpolate(self.images, size, mode="bilinear", antialias=True)


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """One data set on the device, its share of a batch, and what the teacher said of it."""

    images: DeviceImages
    batch: int
    teacher: TeacherTargets | None = None


def draw_batch(
    sets: Sequence[TrainingSet],
    *,
    augmentation: Augmentation,
    image_size: int,
    with_teacher: bool,
    key: tuple[int, ...],
) -> Batch:
    """The batch of `key` (seed, stage, step): fixed teacher crops if `with_teacher`, else fresh ones."""
    device = sets[0].images.pixels.device
    generator = torch.Generator(device).manual_seed(random.Random(str(key)).getrandbits(63))  # noqa: S311
    crops, targets, features, probabilities = [], [], [], []
    for one in sets:
        rows = torch.randint(len(one.images), (one.batch,), generator=generator, device=device)
        if with_teacher and one.teacher is not None:
            view = torch.randint(one.teacher.boxes.shape[1], (one.batch,), generator=generator, device=device)
            boxes = one.teacher.boxes[rows, view]
            features.append(one.teacher.features[rows, view])
            probabilities.append(one.teacher.probabilities[rows, view])
        else:
            boxes = random_crops(one.images.aspect[rows], augmentation, generator)
        # Cut at twice the size and average: antialiased where the source is larger than the input.
        crops.append(F.avg_pool2d(cut(one.images.pixels[rows], boxes, 2 * image_size), 2))
        targets.append(F.one_hot(one.images.labels[rows], one.images.num_classes).float())
    if augmentation.mosaic > 0:
        crops, targets = _mosaic(crops, targets, augmentation.mosaic, key)
    if augmentation.mixup_alpha > 0:
        crops, targets = _mixup(crops, targets, augmentation.mixup_alpha, key)
    return Batch(
        images=colour_jitter(torch.cat(crops), augmentation, generator),
        targets=targets,
        features=torch.cat(features) if features else None,
        probabilities=torch.cat(probabilities) if probabilities else None,
    )


def _mixup(
    crops: list[Tensor], targets: list[Tensor], alpha: float, key: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Mix each picture with its mirror position in the data set's share of the batch, in a ratio of its own."""
    generator = np.random.default_rng(random.Random(str(key)).getrandbits(63))  # noqa: S311  # a seed, not a secret

    def mix(part: Tensor, kept: Tensor) -> Tensor:
        kept = kept.view(-1, *[1] * (part.dim() - 1))
        return kept * part + (1 - kept) * part.flip(0)

    ratios = [torch.from_numpy(generator.beta(alpha, alpha, len(part))).to(part) for part in crops]
    mixed = [mix(part, kept) for part, kept in zip(crops, ratios, strict=True)]
    return mixed, [mix(part, kept) for part, kept in zip(targets, ratios, strict=True)]


def _mosaic(
    crops: list[Tensor], targets: list[Tensor], share: float, key: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Replace the first `share` of each data set's pictures by 2 x 2 or 3 x 3 of its pictures, made smaller.

    So a small picture is also seen near its own size, with sharp edges and many things at once.
    """
    side = random.Random(f"{key}:mosaic").choice((2, 3))  # noqa: S311
    for part, target in zip(crops, targets, strict=True):
        count, size = round(share * len(part)), part.shape[-1]
        tiles = F.interpolate(part, (size // side, size // side), mode="bilinear", antialias=True)
        rows = [torch.cat([tiles.roll(side * row + column, 0) for column in range(side)], -1) for row in range(side)]
        tiled = torch.cat(rows, -2)[:count]
        part[:count] = F.interpolate(tiled, (size, size), mode="bilinear") if tiled.shape[-1] != size else tiled
        target[:count] = torch.stack([target.roll(shift, 0) for shift in range(side**2)]).mean(0)[:count]
    return crops, targets
