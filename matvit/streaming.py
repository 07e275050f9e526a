"""A data set through many encoders: pictures are decoded once per resolution, embeddings alone are kept; no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from matvit.datasets import Pictures, SkippedPicture
from matvit.encoder import ImageEncoder, check_unit
from matvit.errors import ImageError
from matvit.metrics import IntArray
from matvit.near_copies import difference_hash
from matvit.preprocess import FloatArray
from matvit.progress import Progress, ProgressEvent
from matvit.spec import SubmodelSpec
from matvit.threads import usable_cores

_BATCHES_AHEAD = 2  # decoded while the encoders work; bounds the memory held


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedPictures:
    """The N pictures of a data set that could be read."""

    rows: IntArray  # (N,) their positions in the data set
    hashes: FloatArray  # (N, 64), or (N, 0) when near-copies do not matter
    vectors: Mapping[SubmodelSpec, FloatArray]  # (N, D) each
    skipped: tuple[SkippedPicture, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: IntArray) -> EmbeddedPictures:
        """The pictures at these positions."""
        return EmbeddedPictures(
            rows=self.rows[positions],
            hashes=self.hashes[positions],
            vectors={spec: vectors[positions] for spec, vectors in self.vectors.items()},
            skipped=self.skipped,
        )


def embed_pictures(
    pictures: Pictures,
    rows: IntArray,
    *,
    encoders: Mapping[SubmodelSpec, ImageEncoder],
    hashing: bool,
    batch_size: int,
    stage: str,
    progress: Progress,
) -> EmbeddedPictures:
    """Embeds the pictures at `rows` with every encoder, batch by batch; unreadable ones are listed instead."""
    batches: dict[SubmodelSpec, list[FloatArray]] = {spec: [] for spec in encoders}
    readable: list[int] = []
    hashes: list[FloatArray] = []
    skipped: list[SkippedPicture] = []
    for batch in _decoded(pictures, rows, encoders, hashing=hashing, batch_size=batch_size):
        good = [picture for picture in batch if isinstance(picture, _Decoded)]
        skipped += [picture for picture in batch if isinstance(picture, SkippedPicture)]
        readable += [picture.row for picture in good]
        hashes += [picture.hash for picture in good]
        for spec, vectors in _encode(good, encoders):
            batches[spec].append(vectors)
        note = f"{len(skipped)} skipped" if skipped else ""
        done = len(readable) + len(skipped)
        progress(ProgressEvent(stage=stage, done=done, total=len(rows), unit="pictures", note=note))
    return EmbeddedPictures(
        rows=np.array(readable, dtype=np.int64),
        hashes=np.array(hashes, dtype=np.float32).reshape(len(readable), -1 if readable else 0),
        vectors={
            spec: np.concatenate([np.empty((0, encoders[spec].embedding_dim), np.float32), *parts])
            for spec, parts in batches.items()
        },
        skipped=tuple(skipped),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    row: int
    pixels: Mapping[int, FloatArray]  # resolution -> (3, H, W)
    hash: FloatArray


def _decoded(
    pictures: Pictures,
    rows: IntArray,
    encoders: Mapping[SubmodelSpec, ImageEncoder],
    *,
    hashing: bool,
    batch_size: int,
) -> Iterator[list[_Decoded | SkippedPicture]]:
    by_size = {spec.image_size: encoder for spec, encoder in encoders.items()}
    with ThreadPoolExecutor(usable_cores()) as pool:
        waiting: deque[list[Future[_Decoded | SkippedPicture]]] = deque()
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            waiting.append([pool.submit(_decode, pictures, int(row), by_size, hashing) for row in batch])
            if len(waiting) > _BATCHES_AHEAD:
                yield [picture.result() for picture in waiting.popleft()]
        for rest in waiting:
            yield [picture.result() for picture in rest]


def _decode(
    pictures: Pictures, row: int, by_size: Mapping[int, ImageEncoder], hashing: bool
) -> _Decoded | SkippedPicture:
    try:
        image = pictures.images[row]
        return _Decoded(
            row=row,
            pixels={size: encoder.preprocess([image])[0] for size, encoder in by_size.items()},
            hash=difference_hash(image) if hashing else np.empty(0, dtype=np.float32),
        )
    except ImageError as error:
        return SkippedPicture(path=pictures.origins[row], reason=error.what)


def _encode(
    pictures: Sequence[_Decoded], encoders: Mapping[SubmodelSpec, ImageEncoder]
) -> Iterator[tuple[SubmodelSpec, FloatArray]]:
    if not pictures:
        return
    for size in {spec.image_size for spec in encoders}:
        pixels = np.stack([picture.pixels[size] for picture in pictures])
        for spec, encoder in encoders.items():
            if spec.image_size == size:
                vectors = encoder.encode(pixels)
                check_unit(vectors, spec)
                yield spec, vectors
