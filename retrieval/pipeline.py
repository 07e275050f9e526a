"""Pictures through decoding and encoding, both at the same time: in order, in bounded memory, on all cores."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from matvit.decoding import Decoder, Decoders
from matvit.encoder import BatchEncoder, ImageEncoder, is_unit
from matvit.preprocess import FloatArray
from matvit.threads import batches_at_once, limited, threads_of_each, usable_cores
from retrieval.encoders import check_shape, normalised
from retrieval.known import Known
from retrieval.loading import Loaded, Loader, Task
from retrieval.types import SkippedFile

BATCH = 16  # pictures encoded together; Ctrl-C waits for them
AHEAD = 4 * BATCH  # pictures decoded and waiting, at most: bounds the memory
APART_BATCH = 128  # for an encoder on another device, which small batches leave waiting for Python ...
APART_BYTES = 24 * 2**20  # ... while their pixels take no more than this
APART_AT_ONCE = 2  # one is prepared while the device computes the other ...
APART_WAITING = 4  # ... and these are encoded while a publication, for which all else waits, is written
TOGETHER = 16  # pictures that go to a decoder in one message
_PYTHONS_OWN = 5_000  # objects; Python 3.12 and later keep some 400 of their own from their collector
NO_EMBEDDING = "the encoder gave no finite unit-length embedding"
Pixels = npt.NDArray[Any]  # (N, 3, H, W): float32 of the encoder's, uint8 of decoders


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How pictures go through one encoder."""

    encode: Callable[[Pixels], FloatArray]
    batch: int  # pictures that are encoded together
    ahead: int  # pictures that are loaded and wait, at most
    at_once: int  # batches
    waiting: int = 1  # batches, at most, that wait for a thread, so that no thread waits for one
    together: int = 1  # pictures that one thread loads
    decoders: Decoders | None = None  # None: the encoder decodes, in our threads


def way_of(encoder: ImageEncoder) -> Way:
    """Decoded in threads beside an encoder on the same cores, in processes where it says that it takes none of them."""
    for_batches = getattr(type(encoder), "for_batches", None)  # of itself: what wraps another may preprocess otherwise
    apart: BatchEncoder | None = for_batches and for_batches(encoder)
    if apart is None:
        return Way(encode=encoder.encode, batch=BATCH, ahead=AHEAD, at_once=batches_at_once())
    size = encoder.spec.image_size
    batch = max(BATCH, min(APART_BATCH, APART_BYTES // (3 * size * size)))
    ahead = 4 * batch
    return Way(
        encode=apart.encode,
        batch=batch,
        ahead=ahead,
        at_once=APART_AT_ONCE,
        waiting=APART_WAITING,
        together=max(1, min(TOGETHER, ahead // (2 * usable_cores()))),
        decoders=Decoders(Decoder(preprocessing=apart.preprocessing, size=size)),
    )


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
    way = way_of(encoder)
    encoding: deque[Future[list[Embedded]]] = deque()
    with (
        _collecting_new_objects(),
        limited("torch", threads_of_each()),
        way.decoders or nullcontext(),
        _pool("decode", usable_cores()) as decoders,
        _pool("encode", way.at_once) as encoders,
    ):
        loader = Loader(encoder, held, way.decoders)
        for batch in _batched(_decoded(tasks, loader, decoders, way), way):
            encoding.append(encoders.submit(_encode, batch, way.encode, encoder.embedding_dim))
            if len(encoding) == way.at_once + way.waiting:
                yield from encoding.popleft().result()
        while encoding:
            yield from encoding.popleft().result()


@contextmanager
def _collecting_new_objects() -> Iterator[None]:
    """Within the block, Python's collector leaves alone what is there already.

    With torch that is half a million objects: it would go through them now and then, every thread waiting for 0.2 s.
    """
    if not gc.isenabled() or gc.get_freeze_count() > _PYTHONS_OWN:  # someone else decides
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _pool(name: str, threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(
    tasks: Iterable[Task], loader: Loader, decoders: ThreadPoolExecutor, way: Way
) -> Iterator[Loaded | SkippedFile]:
    waiting: deque[Future[list[Loaded | SkippedFile]]] = deque()
    remaining = iter(tasks)
    while together := list(islice(remaining, way.together)):
        waiting.append(decoders.submit(loader.load_all, together))
        if len(waiting) == max(1, way.ahead // way.together):
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _batched(found: Iterable[Loaded | SkippedFile], way: Way) -> Iterator[list[Loaded | SkippedFile]]:
    """In order: up to a batch of pictures for the encoder, with what lies between them."""
    batch: list[Loaded | SkippedFile] = []
    pictures = 0
    for loaded in found:
        batch.append(loaded)
        pictures += _pixels(loaded) is not None
        if pictures == way.batch or len(batch) == way.ahead:
            yield batch
            batch, pictures = [], 0
    yield batch


def _pixels(loaded: Loaded | SkippedFile) -> Pixels | None:
    return loaded.pixels if isinstance(loaded, Loaded) else None


def _encode(batch: Sequence[Loaded | SkippedFile], encode: Callable[[Pixels], FloatArray], dim: int) -> list[Embedded]:
    pixels = [found for loaded in batch if (found := _pixels(loaded)) is not None]
    embeddings: Iterator[FloatArray | None] = iter(())
    if pixels:
        rows = encode(np.concatenate(pixels))
        check_shape(rows, rows=len(pixels), dim=dim)
        good = is_unit(rows)
        fine = iter(normalised(rows[good]))
        embeddings = (next(fine) if one else None for one in good)
    return [
        Embedded(loaded=loaded, embedding=None if _pixels(loaded) is None else next(embeddings)) for loaded in batch
    ]
