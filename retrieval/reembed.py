"""Embedding the index's own pictures once more, from their files: for another encoder, or for damaged embeddings."""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from matvit.encoder import ImageEncoder
from matvit.errors import ImageError
from matvit.preprocess import FloatArray, header_size
from retrieval.encoders import check_shape, is_unit, normalised
from retrieval.items import Item, Place
from retrieval.locations import os_reason, read_picture, split_member, status_of

BATCH = 32  # pictures encoded together
_AHEAD = 2 * BATCH  # pictures decoded and waiting, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """One picture, embedded once more or not; `item` is as its file is now."""

    item: Item
    embedding: FloatArray | None  # (D,) float32 of unit length; None when there is none
    reason: str | None  # why there is none


def embed_again(
    items: Iterable[Item], *, file_name: Callable[[Place], str], encoder: ImageEncoder
) -> Iterator[Embedded]:
    """Every one of `items`, in order. A file that has changed is embedded as it is now.

    Raises EmbeddingError for an encoder that gives embeddings of another shape than it says.
    """
    waiting: deque[Future[tuple[Item, FloatArray | str]]] = deque()
    batch: list[tuple[Item, FloatArray | str]] = []
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        for item in items:
            waiting.append(pool.submit(_read, item, file_name(item.place), encoder))
            if len(waiting) >= _AHEAD:
                batch.append(waiting.popleft().result())
            if len(batch) == BATCH:
                yield from _encode(batch, encoder)
                batch = []
        batch += [future.result() for future in waiting]
        for start in range(0, len(batch), BATCH):
            yield from _encode(batch[start : start + BATCH], encoder)
    finally:
        pool.shutdown(cancel_futures=True)


def _read(item: Item, path: str, encoder: ImageEncoder) -> tuple[Item, FloatArray | str]:
    """The item and its pixels (1, 3, H, W), or why there are none."""
    try:
        status = status_of(split_member(path)[0])
        if not status.regular:  # opening a pipe would wait for ever
            return item, "not a regular file"
        data = read_picture(path)
        size = header_size(io.BytesIO(data), path=path)
        pixels = encoder.preprocess([data])
    except OSError as error:
        return item, os_reason(error)
    except ImageError as error:
        return item, error.what
    found = replace(
        item,
        content_sha256=hashlib.sha256(data).hexdigest(),
        size=status.size,
        mtime_ns=status.mtime_ns,
        width=size[0] if size else None,
        height=size[1] if size else None,
        row=None,
    )
    return found, pixels


def _encode(batch: Sequence[tuple[Item, FloatArray | str]], encoder: ImageEncoder) -> Iterator[Embedded]:
    pixels = [found for _, found in batch if not isinstance(found, str)]
    embeddings: Iterator[FloatArray] = iter(())
    if pixels:
        rows = encoder.encode(np.concatenate(pixels))
        check_shape(rows, rows=len(pixels), dim=encoder.embedding_dim)
        embeddings = iter(rows)
    for item, found in batch:
        if isinstance(found, str):
            yield Embedded(item=item, embedding=None, reason=found)
        elif is_unit(embedding := next(embeddings)).all():
            yield Embedded(item=item, embedding=normalised(embedding), reason=None)
        else:
            yield Embedded(item=item, embedding=None, reason="the encoder gave no finite unit-length embedding")
