"""What the losses need besides the encoder; thrown away after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matvit.training.losses import CosineClassifier
from matvit.training.recipe import TeacherRecipe
from matvit.training.start import plain_teacher


class Heads(nn.Module):
    """One cosine classifier per data set, and the two maps towards a teacher if there is one."""

    feature_mean: Tensor  # (E,) the teacher's mean features over the training data

    def __init__(self, dim: int, classes: Sequence[int], teacher: TeacherRecipe | None) -> None:
        super().__init__()
        self.classes = nn.ModuleList(CosineClassifier(dim, count) for count in classes)
        if teacher is not None:
            # Made for two widths: timm draws its start weights before ours, and other draws would be another run.
            model = plain_teacher(teacher)
            self.teacher_classes = CosineClassifier(dim, model.num_classes)
            width = model.head_hidden_size  # of the pooled features; `num_features` is before the head's own layers
            self.teacher_features = nn.Linear(dim, width)
            self.register_buffer("feature_mean", torch.zeros(width))
