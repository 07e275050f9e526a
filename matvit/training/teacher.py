"""The frozen timm teacher: its answers for fixed random crops are computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from matvit.progress import Progress, ProgressEvent
from matvit.training.crops import cut, random_crops
from matvit.training.data import DeviceImages
from matvit.training.recipe import Augmentation, TeacherRecipe

_BATCH = 512  # crops that the teacher sees together


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What the teacher says of V views of N pictures: E features, T classes."""

    boxes: Tensor  # (N, V, 4) the crops, see `random_crops`
    features: Tensor  # (N, V, E) float16, pooled, not centred
    probabilities: Tensor  # (N, V, T) float16


@torch.no_grad()
def teach(
    teacher: Any,
    images: DeviceImages,
    recipe: TeacherRecipe,
    *,
    augmentation: Augmentation,
    fabric: Fabric,
    seed: int,
    progress: Progress,
) -> TeacherTargets:
    """The teacher's answers for `recipe.views` random crops of every picture; the same for the same seed."""
    generator = torch.Generator(fabric.device).manual_seed(seed)
    teacher = teacher.to(memory_format=torch.channels_last)
    boxes = torch.stack([random_crops(images.aspect, augmentation, generator) for _ in range(recipe.views)], dim=1)
    mean, std = (torch.tensor(value, device=fabric.device).view(3, 1, 1) for value in (recipe.mean, recipe.std))
    features, probabilities = [], []
    for view in range(recipe.views):
        for rows in torch.split(torch.arange(len(images), device=fabric.device), _BATCH):
            crops = (cut(images.pixels[rows], boxes[rows, view], recipe.image_size) - mean) / std
            with fabric.autocast():
                maps = teacher.forward_features(crops.contiguous(memory_format=torch.channels_last))
                pooled = teacher.forward_head(maps, pre_logits=True)
                logits = teacher.get_classifier()(pooled)
            features.append(pooled.half())
            probabilities.append(logits.float().softmax(dim=-1).half())
        progress(ProgressEvent(stage="teacher", done=view + 1, total=recipe.views, unit="views"))
    shape = (recipe.views, len(images), -1)
    return TeacherTargets(
        boxes=boxes,
        features=torch.cat(features).view(shape).transpose(0, 1),
        probabilities=torch.cat(probabilities).view(shape).transpose(0, 1),
    )
