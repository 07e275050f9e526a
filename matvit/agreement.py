"""Do the small encoders answer as XL does? Measured on pictures without labels.

N pictures, R pixels a side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from matvit.datasets import SkippedPicture
from matvit.encoder import check_unit
from matvit.errors import DatasetError, ImageError
from matvit.metrics import agreement, top_k
from matvit.model import MatViT
from matvit.near_copies import copies_of_earlier, difference_hash
from matvit.preprocess import FloatArray, ImageSource, PixelArray
from matvit.threads import usable_cores

HELD_BACK = 5  # every fifth picture is only measured on
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a submodel's answers differ from XL's in XL's index of the same pictures, 0 to 1."""

    cosine: float  # of its embedding with XL's, both centred by XL's mean
    first_by_query: NDArray[np.float64]  # 1 where its first hit is XL's
    by_query: NDArray[np.float64]  # share of XL's first 10 hits that it finds
    recall: float | None  # share of queries whose first hit has their label; None without labels that two share

    @property
    def first(self) -> float:
        """Share of queries with XL's own first hit."""
        return float(self.first_by_query.mean())

    @property
    def agreement_at_10(self) -> float:
        """Share of XL's first 10 hits that it finds, over all queries."""
        return float(self.by_query.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctPictures:
    """Those of some pictures that can be read and are no near-copies of earlier ones, which tell nothing new."""

    pixels: FloatArray  # (N, 3, R, R) as the encoder takes them
    places: NDArray[np.int64]  # (N,) among those that were given
    near_copies: int
    skipped: tuple[SkippedPicture, ...]


def read_pictures(model: MatViT, images: Sequence[ImageSource], *, fewest: int, most: int) -> DistinctPictures:
    """Of more than `most` a sample, always the same. Raises DatasetError when fewer than `fewest` are left."""
    places: Sequence[int] = range(len(images))
    if len(images) > most:
        places = random.Random(0).sample(places, most)  # noqa: S311  # a seed, not a secret
    drawn = [images[place] for place in places]
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(partial(_read, model), drawn))
    failed = [(image, one) for image, one in zip(drawn, found, strict=True) if isinstance(one, ImageError)]
    read = [(place, *one) for place, one in zip(places, found, strict=True) if not isinstance(one, ImageError)]
    copies = copies_of_earlier(np.stack([hashed for *_, hashed in read])) if read else ()
    kept = [one for one, is_copy in zip(read, copies, strict=True) if not is_copy]
    if len(kept) < fewest:
        lost = {"cannot be read": len(failed), "are near-copies of others": len(read) - len(kept)}
        why = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count)
        raise DatasetError(
            what=f"{len(kept)} of {len(drawn)} pictures can be used, and {fewest} are needed"
            + (f": {why}" if why else ""),
            where="pictures",
            fix="give a folder with more that differ, a few hundred at best",
        )
    return DistinctPictures(
        pixels=model.preprocessing.normalise(np.stack([pixels for _, pixels, _ in kept])),
        places=np.array([place for place, *_ in kept]),
        near_copies=len(read) - len(kept),
        skipped=tuple(SkippedPicture(path=str(image), reason=error.what) for image, error in failed),
    )


def _read(model: MatViT, image: ImageSource) -> tuple[PixelArray, FloatArray] | ImageError:
    """(3, R, R) of native resolution, and its difference hash."""
    try:
        pixels = model.preprocessing.pixels(image, size=model.shape.image_size)
    except ImageError as error:
        return error
    return pixels, difference_hash(Image.fromarray(pixels.transpose(1, 2, 0)))


@torch.inference_mode()
def agreement_with_full(
    model: MatViT, pixels: FloatArray, queries: Sequence[int], *, specs: Sequence[str]
) -> dict[str, Agreement]:
    """Each spec's answers beside XL's: the pictures at `queries` search XL's embeddings of all others.

    `pixels` (N, 3, R, R), normalised, of native resolution.
    """
    gallery = embed(model, pixels, "XL")
    own = np.asarray(queries, dtype=np.int64)
    return {spec: compare(embed(model, pixels[own], spec), gallery, own) for spec in specs}


def compare(
    vectors: FloatArray, gallery: FloatArray, own: NDArray[np.int64], labels: NDArray[np.int64] | None = None
) -> Agreement:
    """A submodel's embeddings (Q, D) of the pictures `own` (Q,), which search XL's embeddings (N, D) of the others.

    `labels` (N,) count from 0.
    """
    wanted = top_k(gallery[own], gallery, 10, exclude=own[:, None])[1]
    hits = top_k(vectors, gallery, 10, exclude=own[:, None])[1]
    mean = gallery.mean(axis=0)
    centred, target = vectors - mean, gallery[own] - mean
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(target, axis=1)
    return Agreement(
        cosine=float(((centred * target).sum(axis=1) / np.maximum(norms, 1e-12)).mean()),
        first_by_query=(hits[:, 0] == wanted[:, 0]).astype(np.float64),
        by_query=agreement(hits, wanted),
        recall=None if labels is None else _recall(hits[:, 0], own, labels),
    )


def _recall(first: NDArray[np.int64], own: NDArray[np.int64], labels: NDArray[np.int64]) -> float | None:
    asked = np.bincount(labels)[labels[own]] > 1  # there is something to find
    right = labels[first] == labels[own]
    return float(right[asked].mean()) if asked.any() else None


@torch.inference_mode()
def embed(model: MatViT, pixels: FloatArray, spec: str) -> FloatArray:
    """(N, 3, R, R) of native resolution -> (N, D) by the submodel `spec`."""
    encoder = model.encoder(spec)
    vectors = np.concatenate([encoder.encode(pixels[row : row + _BATCH]) for row in range(0, len(pixels), _BATCH)])
    check_unit(vectors, encoder.spec)
    return vectors
