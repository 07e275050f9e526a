"""Adapting the small encoders to a person's own pictures, without labels: XL, and so every index, stays as it is.

What S, M and L own in the last block is fitted to XL's tokens on the pictures: no gradient step, only least squares.
N pictures, D embedding, R pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from matvit.agreement import HELD_BACK, Agreement, compare, embed, read_pictures
from matvit.datasets import SkippedPicture
from matvit.last_block import Tokens, fit_last_block, read_tokens
from matvit.metrics import IntArray, bootstrap_intervals
from matvit.model import MatViT
from matvit.preprocess import FloatArray, ImageSource
from matvit.private import OWNERS, PrivateConfig
from matvit.progress import Progress, ProgressEvent, silent
from matvit.spec import Granularity

FEWEST_PICTURES, MOST_PICTURES = 40, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a granularity's answers gained, each picture measured by a fit to others."""

    before: Agreement
    after: Agreement
    low: float  # ends of the 95 % interval of the paired difference in agreement@10
    high: float
    first_high: float  # high end of the 68 % interval, a standard error, of that in the same first hit

    @property
    def kept(self) -> bool:
        """Whether it surely gained, and not at the first hit's expense: else it owns what it owned before."""
        return self.low > 0 and self.first_high >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What was gained, and what was kept."""

    pictures: int
    near_copies: int  # of one of them, and left out: they would be measured by a fit to their like
    skipped: tuple[SkippedPicture, ...]
    gains: Mapping[str, Gain]

    @property
    def kept(self) -> tuple[str, ...]:
        """The granularities that gained."""
        return tuple(name for name, gain in self.gains.items() if gain.kept)


def adapt(
    model: MatViT, images: Sequence[ImageSource], *, labels: Sequence[str] | None = None, progress: Progress = silent
) -> Adaptation:
    """Fit what S, M and L own in the last block; a granularity that does not surely gain keeps the old.

    Of more than MOST_PICTURES a sample is taken, and of near-copies the first. XL and `space_id` stay to the bit. With
    `labels`, as many as `images`, recall is measured too; nothing is learnt from them. Raises DatasetError for too few
    pictures.
    """
    steps = _Steps(progress)
    found = read_pictures(model, images, fewest=FEWEST_PICTURES, most=MOST_PICTURES)
    pixels, classes = found.pixels, _classes(labels and [labels[place] for place in found.places])
    steps.done("pictures read")
    full = read_tokens(model, pixels, model.shape.spec("XL"))
    steps.done("XL")
    old = model.private
    _let_last_block_own(model)
    gains = {owner.value: _fit(model, owner, pixels, full=full, classes=classes, steps=steps) for owner in OWNERS}
    if not any(gain.kept for gain in gains.values()):
        model.private = old
    return Adaptation(pictures=len(pixels), near_copies=found.near_copies, skipped=found.skipped, gains=gains)


def _classes(labels: Sequence[str] | None) -> IntArray | None:
    """(N,) the labels, counted from 0; None where all are alike."""
    names, classes = np.unique(labels or (), return_inverse=True)
    return classes if len(names) > 1 else None


def _let_last_block_own(model: MatViT) -> None:
    """Full deltas in the last block, zero at first, beside what is owned already."""
    old = model.private
    model.add_private(PrivateConfig(rank=None if old is None else old.config.rank, last=True))
    if old is not None:
        assert model.private is not None
        model.private.load_state_dict(model.private.state_dict() | old.state_dict())


def _fit(
    model: MatViT, owner: Granularity, pixels: FloatArray, *, full: Tokens, classes: IntArray | None, steps: _Steps
) -> Gain:
    spec = model.shape.spec(owner.value)
    last = model.shape.num_blocks - 1
    block = model.block_of(last, spec.widths[last])  # with what it owns before
    assert model.private is not None
    owned = model.private.of(last, width=spec.widths[last], full_width=model.shape.ffn_widths[last])
    assert owned is not None
    old = {name: tensor.clone() for name, tensor in owned.state_dict().items()}
    tokens = read_tokens(model, pixels, spec)
    steps.done(owner.value)

    def change(rows: torch.Tensor) -> None:
        """To what the pictures of these tokens say."""
        owned.load_state_dict(old)
        for name, delta in fit_last_block(model, block, tokens.of(rows), full.outgoing[rows]).items():
            owned.add(name, delta)

    vectors = np.empty_like(tokens.embeddings)
    for part in range(HELD_BACK):
        change(tokens.picture % HELD_BACK != part)
        vectors[part::HELD_BACK] = embed(model, pixels[part::HELD_BACK], owner.value)
        steps.done(owner.value)
    gain = _gain(tokens.embeddings, vectors, full.embeddings, classes)
    if gain.kept:
        change(torch.ones_like(tokens.picture, dtype=torch.bool))
    else:
        owned.load_state_dict(old)
    return gain


def _gain(before: FloatArray, after: FloatArray, gallery: FloatArray, classes: IntArray | None) -> Gain:
    own = np.arange(len(gallery))
    sides = [compare(vectors, gallery, own, classes) for vectors in (before, after)]
    ((low, high),) = bootstrap_intervals((sides[1].by_query - sides[0].by_query)[:, None])
    ((_, first),) = bootstrap_intervals((sides[1].first_by_query - sides[0].first_by_query)[:, None], level=0.68)
    return Gain(before=sides[0], after=sides[1], low=float(low), high=float(high), first_high=float(first))


class _Steps:
    """Counts what is done: reading the pictures, XL, and for each owner one pass before and the fits."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.count = progress, 0

    def done(self, note: str) -> None:
        self.count += 1
        total = 2 + len(OWNERS) * (1 + HELD_BACK)
        self.progress(ProgressEvent(stage="adapt", done=self.count, total=total, unit="steps", note=note))
