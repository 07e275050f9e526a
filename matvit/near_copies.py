"""Pictures that are nearly the same: a query whose own copy is in the gallery measures nothing; no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from matvit.metrics import BoolArray, top_k
from matvit.preprocess import FloatArray, ImageSource, open_image, resize_centre_square

NEAR_COPY_BITS = 3  # pictures whose 64-bit difference hashes differ in at most these many bits
_HASH_PIXELS = 112


def difference_hash(image: ImageSource) -> FloatArray:
    """The 64-bit dHash of the centre square that an encoder sees, as (64,) float32 of -1 and 1.

    In this form an inner product is 64 - 2 x the number of bits that differ. Raises ImageError.
    """
    grey = resize_centre_square(open_image(image, draft_size=2 * _HASH_PIXELS).convert("L"), _HASH_PIXELS)
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return np.where(small[:, 1:] > small[:, :-1], 1, -1).astype(np.float32).ravel()


def near_copies(hashes: FloatArray, gallery_hashes: FloatArray) -> BoolArray:
    """(Q, 64), (M, 64) -> (Q,) bool: the gallery holds nearly the same picture. All False without hashes."""
    if not (hashes.size and gallery_hashes.size):
        return np.zeros(len(hashes), dtype=np.bool_)
    nearest, _ = top_k(hashes, gallery_hashes, 1)
    return np.asarray(nearest[:, 0] >= hashes.shape[1] - 2 * NEAR_COPY_BITS)


def copies_of_earlier(hashes: FloatArray) -> BoolArray:
    """(N, 64) -> (N,) bool: nearly the same as one before it that is none itself. So no two of the others are."""
    alike = hashes @ hashes.T >= hashes.shape[1] - 2 * NEAR_COPY_BITS
    copies = np.zeros(len(hashes), dtype=np.bool_)
    for row in range(len(hashes)):
        copies[row] = bool((alike[row, :row] & ~copies[:row]).any())
    return copies
