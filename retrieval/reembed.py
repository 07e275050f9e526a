"""Embedding the index's own pictures once more, from their files: for another encoder, or for damaged embeddings."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray
from retrieval.errors import IngestError
from retrieval.files import FREE, exhausted
from retrieval.items import Item, Place
from retrieval.loading import Task
from retrieval.locations import Open, Status, is_url, open_picture, split_member
from retrieval.pipeline import NO_EMBEDDING, Embedded, embed_all
from retrieval.shards import RowReader, is_table
from retrieval.types import SkippedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedAgain:
    """One picture, embedded once more or not; `item` is as its file is now."""

    item: Item
    embedding: FloatArray | None  # (D,) float32 of unit length; None when there is none
    reason: str | None  # why there is none


def embed_again(
    items: Iterable[Item], *, file_name: Callable[[Place], str], encoder: ImageEncoder
) -> Generator[EmbeddedAgain]:
    """Every one of `items`, in order. A file that has changed is embedded as it is now.

    Raises EmbeddingError for an encoder that gives embeddings of another shape than it says; IngestError when no more
    files can be opened: the pictures are not lost.
    """
    waiting: deque[Item] = deque()

    def tasks() -> Iterator[Task]:
        for item in items:
            waiting.append(item)
            place = file_name(item.place)
            is_file = not is_url(place) and split_member(place)[1] is None
            yield Task(
                full_path=place,
                root=item.root,
                path=item.path,
                known=None,
                open=partial(_open, place, _source(place, rows)),
                is_file=is_file,
            )

    with closing(RowReader()) as rows, closing(embed_all(tasks(), encoder=encoder, held=lambda _: None)) as results:
        for embedded in results:
            yield _again(waiting.popleft(), embedded)


def _open(place: str, source: Open) -> tuple[BinaryIO, Status]:
    try:
        return source()
    except OSError as error:
        if exhausted(error):
            raise IngestError(what=f"cannot be read ({error.strerror})", where=place, fix=FREE) from error
        raise


def _source(place: str, rows: RowReader) -> Open:
    """How to open the picture at `place`; the row of a table is read here, in order, since threads would jump."""
    container, member = split_member(place)
    if member is None or not is_table(container):
        return partial(open_picture, place)
    try:
        data, status = rows.read(container, member)
    except OSError as error:
        return partial(_refuse, error)
    return lambda: (io.BytesIO(data), status)


def _refuse(error: OSError) -> tuple[BinaryIO, Status]:
    raise error


def _again(item: Item, embedded: Embedded) -> EmbeddedAgain:
    loaded = embedded.loaded
    if isinstance(loaded, SkippedFile) or loaded.reason is not None:
        return EmbeddedAgain(item=item, embedding=None, reason=loaded.reason)
    found = replace(
        item,
        content_sha256=loaded.content_sha256,
        size=loaded.size,
        mtime_ns=loaded.mtime_ns,
        width=loaded.width,
        height=loaded.height,
        row=None,
    )
    return EmbeddedAgain(
        item=found, embedding=embedded.embedding, reason=NO_EMBEDDING if embedded.embedding is None else None
    )
