"""The weighted losses of one submodel on one batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matvit.training import losses
from matvit.training.batches import Batch
from matvit.training.heads import Heads
from matvit.training.recipe import Losses


def objective(
    heads: Heads, weights: Losses, embeddings: Tensor, batch: Batch, anchors: Tensor | None, *, prefix: int
) -> Tensor:
    """The weighted losses of one submodel; with a weight for prefixes, those of its first `prefix` numbers too."""
    terms = _terms(heads, weights, embeddings, batch, anchors)
    if weights.teacher_features and batch.features is not None:
        centred = batch.features.float() - heads.feature_mean
        terms.append(weights.teacher_features * losses.teacher_features(heads.teacher_features(embeddings), centred))
    if weights.prefix:
        short = F.normalize(embeddings[:, :prefix], dim=-1)
        short_anchors = None if anchors is None else F.normalize(anchors[:, :prefix], dim=-1)
        terms += [weights.prefix * term for term in _terms(heads, weights, short, batch, short_anchors)]
    return torch.stack(terms).sum()


def _terms(heads: Heads, weights: Losses, embeddings: Tensor, batch: Batch, anchors: Tensor | None) -> list[Tensor]:
    terms: list[Tensor] = []
    if weights.classification:
        parts = torch.split(embeddings, [len(target) for target in batch.targets])
        logits = [head(part) for head, part in zip(heads.classes, parts, strict=True)]
        terms.append(weights.classification * losses.classification(logits, batch.targets))
    if weights.teacher_classes and batch.probabilities is not None:
        logits_t = heads.teacher_classes(embeddings)
        terms.append(weights.teacher_classes * losses.teacher_classes(logits_t, batch.probabilities))
    if anchors is not None:
        if weights.cosine:
            terms.append(weights.cosine * losses.cosine(embeddings, anchors, centred=weights.centred))
        if weights.similarity:
            terms.append(weights.similarity * losses.similarity(embeddings, anchors))
        if weights.contrast:
            terms.append(weights.contrast * losses.contrast(embeddings, anchors))
    return terms
