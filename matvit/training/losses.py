"""What is minimised. B pictures, D embedding, C classes, T teacher classes; embeddings have unit length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.05  # of `similarity` and `contrast`
LOGIT_SCALE = 20.0  # of the cosine classifiers
SMOOTHING = 0.1


class CosineClassifier(nn.Module):
    """Logits = scale x cosine to one prototype per class: (B, D) -> (B, C)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        # Small, so that they turn quickly: only their direction counts, and AdamW's steps have one size.
        self.prototypes = nn.Parameter(0.02 * torch.randn(classes, dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings of unit length (B, D), or their first numbers scaled to it (B, d) -> logits (B, C)."""
        return LOGIT_SCALE * embeddings @ F.normalize(self.prototypes[:, : embeddings.shape[1]], dim=-1).T


def classification(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Smoothed cross-entropy over each data set's own classes; one (B_i, C_i) and (B_i,) or (B_i, C_i) per set."""
    losses = [
        F.cross_entropy(part.float(), target, label_smoothing=SMOOTHING, reduction="sum")
        for part, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses).sum() / sum(len(part) for part in logits)


def teacher_classes(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Cross-entropy to the teacher's probabilities: (B, T), (B, T)."""
    return F.cross_entropy(logits.float(), probabilities.float())


def teacher_features(mapped: Tensor, centred: Tensor) -> Tensor:
    """1 - cosine of the mapped embedding to the teacher's centred features: (B, E), (B, E)."""
    return 1 - F.cosine_similarity(mapped.float(), centred.float(), dim=-1).mean()


def cosine(embeddings: Tensor, anchors: Tensor, *, centred: bool = False) -> Tensor:
    """1 - cosine to the frozen encoder's embedding of the same picture: (B, D), (B, D).

    `centred` takes the mean of the batch's anchors from both sides first: what all pictures share counts for nothing.
    """
    if not centred:
        return 1 - (embeddings * anchors).sum(dim=-1).mean()
    mean = anchors.mean(dim=0)
    return 1 - F.cosine_similarity(embeddings - mean, anchors - mean, dim=-1).mean()


def similarity(embeddings: Tensor, anchors: Tensor) -> Tensor:
    """KL of "how similar is this query to the batch's gallery" from the frozen encoder's own answer.

    The gallery side is the frozen encoder's on both sides, as in asymmetric retrieval; a picture's
    similarity to itself is left out. (B, D), (B, D) -> ().
    """
    itself = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    # Finite, for the divergence multiplies it by a probability of 0.
    wanted = (anchors @ anchors.T / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(dim=-1)
    given = (embeddings @ anchors.T / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(dim=-1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def contrast(embeddings: Tensor, anchors: Tensor) -> Tensor:
    """InfoNCE: find the frozen encoder's embedding of the same picture among the batch's (B, D), (B, D)."""
    targets = torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(embeddings @ anchors.T / TEMPERATURE, targets)
