"""A plain ViT made elastic without training: hidden units ordered by importance, and what each granularity loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from matvit.agreement import HELD_BACK, Agreement, agreement_with_full, read_pictures
from matvit.datasets import SkippedPicture
from matvit.importance import order_by_importance
from matvit.model import AxesConfig, MatViT
from matvit.preprocess import ImageSource
from matvit.progress import Progress, ProgressEvent, silent

FEWEST_PICTURES, MOST_PICTURES = 20, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """On what the units were ordered, and how each granularity's answers differ from XL's on other pictures."""

    pictures: int  # that the order was found on
    held_back: int
    near_copies: int  # of one of them, and left out: they would be found too easily
    skipped: tuple[SkippedPicture, ...]
    agreement: Mapping[str, Agreement]


def convert(model: MatViT, images: Sequence[ImageSource], *, progress: Progress = silent) -> Conversion:
    """Order the hidden units of a plain encoder in place, and open its resolution axis; XL stays to rounding.

    Of more than MOST_PICTURES a sample is taken, and of near-copies the first. Every fifth picture is held back, to
    measure on. Raises DatasetError for too few pictures.
    """
    _tell(progress, 0, "reading pictures")
    read = read_pictures(model, images, fewest=FEWEST_PICTURES, most=MOST_PICTURES)
    pixels = read.pixels
    held_back = range(0, len(pixels), HELD_BACK)
    others = [row for row in range(len(pixels)) if row % HELD_BACK]
    _tell(progress, 1, "ordering hidden units")
    model.open_axes(AxesConfig(image_size_step=model.config.patch_size))
    order_by_importance(model, torch.from_numpy(pixels[others]))
    _tell(progress, 2, "measuring")
    specs = [str(spec) for spec in model.shape.granularities()]
    found = agreement_with_full(model, pixels, held_back, specs=specs)
    _tell(progress, 3, "measured")
    return Conversion(
        pictures=len(others),
        held_back=len(held_back),
        near_copies=read.near_copies,
        skipped=read.skipped,
        agreement=found,
    )


def _tell(progress: Progress, done: int, note: str) -> None:
    progress(ProgressEvent(stage="convert", done=done, total=3, unit="steps", note=note))
