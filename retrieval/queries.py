"""What can be searched with: a picture, an item of the index, or several of those as one query."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import numpy as np
from PIL import Image

from matvit.encoder import ImageEncoder
from matvit.errors import ImageError
from matvit.metrics import IntArray
from matvit.preprocess import FloatArray, ImageSource
from retrieval.arguments import is_whole
from retrieval.encoders import normalised
from retrieval.errors import SearchError
from retrieval.exact import Found
from retrieval.files import sha256_bytes
from retrieval.gallery import Gallery
from retrieval.locations import absolute, is_virtual, location, read_picture

PICTURE_TYPES = (str, os.PathLike, bytes, Image.Image)  # ImageSource, as isinstance takes it
Fusion = Literal["mean", "rank"]

UNLIKE = 0.5  # how much one is pushed away: with the full weight, what like and unlike share would be lost
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)


@dataclass(frozen=True, slots=True)
class Blend:
    """Several pictures (or items, by id) as one query: more like these, less like those.

    `fusion="mean"`: one search with the mean embedding of `like`, less half of that of `unlike`; the score is the
    cosine similarity to it. `fusion="rank"`: each picture is searched with alone, and its best max(10, k) hits
    get 61 / (60 + rank) votes, all others none; the score is the mean over `like`, less half of that
    over `unlike`: 1 is the first hit of all.
    """

    like: Sequence[ImageSource | int]
    unlike: Sequence[ImageSource | int] = field(default=(), kw_only=True)
    fusion: Fusion = field(default="mean", kw_only=True)

    @property
    def parts(self) -> tuple[ImageSource | int, ...]:
        """`like`, then `unlike`."""
        return (*self.like, *self.unlike)

    @property
    def weights(self) -> FloatArray:
        """(parts,) float32: what each part counts."""
        return np.concatenate(
            [
                np.full(len(self.like), 1 / len(self.like), dtype=np.float32),
                np.full(len(self.unlike), -UNLIKE / max(1, len(self.unlike)), dtype=np.float32),
            ]
        )


Query = ImageSource | int | Blend


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One checked query: its parts, of which a single picture or item is the only one."""

    blend: Blend
    single: bool

    @property
    def pictures(self) -> list[ImageSource]:
        """The parts that must be encoded."""
        return [part for part in self.blend.parts if not isinstance(part, int)]


def check(query: Query, gallery: Gallery) -> Asked:
    """Raises SearchError for what is no query, or an id that `gallery` does not hold."""
    if isinstance(query, PICTURE_TYPES):
        return Asked(blend=Blend([query]), single=True)
    single = not isinstance(query, Blend)
    blend = Blend([query]) if not isinstance(query, Blend) else query
    for name, parts in (("like", blend.like), ("unlike", blend.unlike)):
        if isinstance(parts, PICTURE_TYPES) or not isinstance(parts, Sequence):
            raise SearchError(what=f"'{name}' is no list", where="Blend", fix="give a list of pictures or ids")
    if not blend.like:
        raise SearchError(what="'like' is empty", where="Blend", fix="give a picture or more that hits should be like")
    if blend.fusion not in ("mean", "rank"):
        raise SearchError(what=f"fusion is {blend.fusion!r}", where="Blend", fix="give 'mean' or 'rank'")
    like, unlike = ([_part(part, gallery) for part in parts] for parts in (blend.like, blend.unlike))
    return Asked(blend=Blend(like, unlike=unlike, fusion=blend.fusion), single=single)


def _part(part: Any, gallery: Gallery) -> ImageSource | int:
    if isinstance(part, str | os.PathLike | bytes | Image.Image):
        return part
    if not is_whole(part):
        raise SearchError(
            what=f"a {type(part).__name__} is no picture",
            where="search",
            fix="give a path, a file's bytes, a PIL image, or the id of an item",
        )
    gallery.position_of(index(part))  # raises
    return index(part)


def name_of(asked: Asked, gallery: Gallery) -> str | None:
    """The path that is searched with; "a + b - c" for several; None when one of them has none."""
    names = [_name(part, gallery) for part in asked.blend.parts]
    if None in names:
        return None
    signs = [" + "] * len(asked.blend.like) + [" - "] * len(asked.blend.unlike)
    return "".join(f"{sign}{name}" for sign, name in zip(signs, names, strict=True)).removeprefix(" + ")


def own_positions(asked: Asked, gallery: Gallery) -> set[int]:
    """Where in the gallery the query's own pictures are: the same path, or the same content.

    Raises SearchError for a PIL image, which has neither.
    """
    return set().union(*(_own(part, gallery) for part in asked.blend.parts))


def _own(part: ImageSource | int, gallery: Gallery) -> set[int]:
    if isinstance(part, int):
        return gallery.same_picture(file=None, digest=gallery.digests[gallery.positions[part]])
    if isinstance(part, Image.Image):
        raise SearchError(
            what="a PIL image does not tell its file", where="exclude_self", fix="give a path or the file's bytes"
        )
    if isinstance(part, bytes):
        return gallery.same_picture(file=None, digest=bytes.fromhex(sha256_bytes(part)))
    place = absolute(location(part))
    return gallery.same_picture(file=place, digest=bytes.fromhex(sha256_bytes(read_picture(place))))


def preprocess_all(pictures: Sequence[ImageSource], encoder: ImageEncoder) -> FloatArray:
    """(N, 3, H, W) float32, of N pictures at least. Raises ImageError, which names the picture."""
    pixels = [_preprocessed(picture, encoder) for picture in pictures]
    return pixels[0] if len(pixels) == 1 else np.concatenate(pixels)


def _preprocessed(picture: ImageSource, encoder: ImageEncoder) -> FloatArray:
    if not isinstance(picture, str | os.PathLike):
        return encoder.preprocess([picture])
    place = location(picture)
    if not is_virtual(place):
        return encoder.preprocess([place])
    try:
        return encoder.preprocess([read_picture(place)])
    except ImageError as error:
        raise ImageError(what=error.what, where=place, fix=error.fix) from error


def embeddings(asked: Asked, encoded: Iterator[FloatArray], gallery: Gallery) -> FloatArray:
    """(P, D) float32, one row for each part: items' are stored, pictures' are taken from `encoded`."""
    if asked.single and asked.pictures:
        return next(encoded)[np.newaxis]
    return np.stack(
        [
            gallery.vectors.vectors(np.array([gallery.positions[part]]))[0] if isinstance(part, int) else next(encoded)
            for part in asked.blend.parts
        ]
    )


def mean(asked: Asked, parts: FloatArray) -> FloatArray:
    """(P, D) -> (D,) float32 of unit length: one query for all parts. Raises SearchError when they cancel out."""
    if asked.single:
        only: FloatArray = parts[0]
        return only
    blended: FloatArray = np.asarray(asked.blend.weights @ parts, dtype=np.float32)
    if not np.linalg.norm(blended) > 1e-3:
        raise SearchError(
            what="the pictures cancel each other out", where="Blend", fix="leave some out, or use fusion='rank'"
        )
    return normalised(blended)


def depth(k: int | None) -> int | None:
    """How many hits of each part have votes in the fusion by rank.

    Few: in long lists two middling ranks are worth more than a first and a low one.
    """
    return None if k is None else max(10, k)


def fuse_ranks(asked: Asked, answers: Sequence[Found], *, ids: IntArray, k: int | None) -> Found:
    """Reciprocal rank fusion of the answers to each part; only what some part of `like` has found is a hit."""
    liked = answers[: len(asked.blend.like)]
    positions = np.unique(np.concatenate([found for found, _ in liked]))
    votes = np.zeros(len(positions))
    for weight, (found, _) in zip(asked.blend.weights.astype(np.float64), answers, strict=True):
        place = np.searchsorted(positions, found)
        known = place < len(positions)
        known[known] = positions[place[known]] == found[known]
        votes[place[known]] += weight * (_RANK_OFFSET + 1) / (_RANK_OFFSET + 1 + np.flatnonzero(known))
    best = np.lexsort((ids[positions], -votes))[:k]
    return positions[best], votes[best]


def _name(part: ImageSource | int, gallery: Gallery) -> str | None:
    if isinstance(part, int):
        return str(gallery.path(gallery.positions[part]))
    return None if isinstance(part, bytes | Image.Image) else location(part)
