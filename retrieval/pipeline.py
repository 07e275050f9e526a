"""Pictures through decoding and encoding, both at the same time: in order, in bounded memory, on all cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from matvit.encoder import ImageEncoder, is_unit
from matvit.preprocess import FloatArray
from matvit.threads import batches_at_once, limited, threads_of_each, usable_cores
from retrieval.encoders import check_shape, normalised
from retrieval.known import Known
from retrieval.loading import Loaded, Loader, Task
from retrieval.types import SkippedFile

BATCH = 16  # pictures encoded together; Ctrl-C waits for them
AHEAD = 4 * BATCH  # pictures decoded and waiting, at most: bounds the memory
NO_EMBEDDING = "the encoder gave no finite unit-length embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What became of one task."""

    loaded: Loaded | SkippedFile
    embedding: FloatArray | None  # (D,) float32 of unit length; None without pixels, or when the encoder gave none


def embed_all(
    tasks: Iterable[Task], *, encoder: ImageEncoder, held: Callable[[str], Known | None]
) -> Generator[Embedded]:
    """Every one of `tasks`, in order; pictures that are `held` (see `Loader`) are not embedded.

    Close it (`contextlib.closing`) to end early: it begins nothing more, and waits for what is in work.
    Raises EmbeddingError for an encoder that gives embeddings of another shape than it says, and whatever the
    encoder itself raises, after what comes before that batch.
    """
    loader, parallel = Loader(encoder, held), batches_at_once()
    encoding: deque[Future[list[Embedded]]] = deque()
    with (
        limited("torch", threads_of_each()),
        _pool("decode", usable_cores()) as decoders,
        _pool("encode", parallel) as encoders,
    ):
        for batch in _batched(_decoded(tasks, loader, decoders)):
            encoding.append(encoders.submit(_encode, batch, encoder))
            if len(encoding) > parallel:  # one waits, so that no thread does
                yield from encoding.popleft().result()
        while encoding:
            yield from encoding.popleft().result()


@contextmanager
def _pool(name: str, threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(tasks: Iterable[Task], loader: Loader, decoders: ThreadPoolExecutor) -> Iterator[Loaded | SkippedFile]:
    waiting: deque[Future[Loaded | SkippedFile]] = deque()
    for task in tasks:
        waiting.append(decoders.submit(loader.load, task))
        if len(waiting) == AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batched(found: Iterable[Loaded | SkippedFile]) -> Iterator[list[Loaded | SkippedFile]]:
    """In order: up to BATCH pictures for the encoder, with what lies between them."""
    batch: list[Loaded | SkippedFile] = []
    pictures = 0
    for loaded in found:
        batch.append(loaded)
        pictures += _pixels(loaded) is not None
        if pictures == BATCH or len(batch) == AHEAD:
            yield batch
            batch, pictures = [], 0
    yield batch


def _pixels(loaded: Loaded | SkippedFile) -> FloatArray | None:
    return loaded.pixels if isinstance(loaded, Loaded) else None


def _encode(batch: Sequence[Loaded | SkippedFile], encoder: ImageEncoder) -> list[Embedded]:
    pixels = [found for loaded in batch if (found := _pixels(loaded)) is not None]
    embeddings: Iterator[FloatArray | None] = iter(())
    if pixels:
        rows = encoder.encode(np.concatenate(pixels))
        check_shape(rows, rows=len(pixels), dim=encoder.embedding_dim)
        good = is_unit(rows)
        fine = iter(normalised(rows[good]))
        embeddings = (next(fine) if one else None for one in good)
    return [
        Embedded(loaded=loaded, embedding=None if _pixels(loaded) is None else next(embeddings)) for loaded in batch
    ]
