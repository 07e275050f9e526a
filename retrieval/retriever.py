"""Searching an index with any submodel of the encoder that built it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index
from pathlib import Path

import numpy as np
from PIL import Image

from matvit.encoder import ElasticEncoder, ImageEncoder
from matvit.preprocess import FloatArray, ImageSource
from matvit.spec import SubmodelSpec
from retrieval.encoders import EncoderCache, check_shape, check_space, is_unit, load_encoder, normalised
from retrieval.errors import EmbeddingError, SearchError
from retrieval.flat import FlatSearch, ScoreArray
from retrieval.items import IntArray, Place
from retrieval.manifest import read_current
from retrieval.snapshot import Snapshot
from retrieval.types import Hit, Hits, Latency

QueryEncoder = str | SubmodelSpec | ImageEncoder
_PICTURE = (str, os.PathLike, bytes, Image.Image)  # ImageSource, as isinstance takes it


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gallery:
    """One generation, ready to be searched."""

    snapshot: Snapshot
    ids: IntArray  # (N,) int64, live pictures of all segments in order
    places: Sequence[Place]  # (N,) where their files are
    vectors: FlatSearch

    @classmethod
    def open(cls, folder: Path, *, reuse: Snapshot | None = None) -> _Gallery:
        return read_current(folder, lambda _: cls._read(Snapshot.open(folder, reuse=reuse)))

    @classmethod
    def _read(cls, snapshot: Snapshot) -> _Gallery:
        """All that searching needs is in memory afterwards: a writer may remove the files, and none stays open."""
        live = [(segment, segment.live_rows()) for segment in snapshot.segments]
        none = np.empty(0, dtype=np.int64)
        ids = np.concatenate([none, *(segment.row_ids[rows] for segment, rows in live)])
        places: list[Place] = []
        for segment, rows in live:
            every = segment.items.places()
            places += [every[row] for row in rows.tolist()]
        vectors = FlatSearch(
            ids,
            (segment.embeddings()[rows] for segment, rows in live),
            dim=snapshot.manifest.encoder.embedding_dim,
        )
        return cls(snapshot=snapshot, ids=ids, places=places, vectors=vectors)

    def hits(self, positions: IntArray, scores: ScoreArray) -> tuple[Hit, ...]:
        """Join what was found with its files."""
        return tuple(
            Hit(
                rank=rank,
                id=int(self.ids[position]),
                path=self.snapshot.full_path(self.places[position]),
                score=min(1.0, max(-1.0, score)),  # unit length is exact to rounding only
            )
            for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist(), strict=True), start=1)
        )


class Retriever:
    """Searches one generation of an index, the one that counted when it was opened; `reload` moves on.

    May be shared by threads.
    """

    def __init__(self, gallery: _Gallery, *, encoder: ElasticEncoder | None) -> None:
        self._gallery = gallery
        self._submodels = None if encoder is None else (encoder, EncoderCache(encoder))
        self._lock = threading.Lock()  # held while an encoder is loaded, and while another generation is

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, encoder: ElasticEncoder | None = None) -> Retriever:
        """Open an index for searching, every byte checked; its vectors and paths are read into memory.

        `encoder` None: the one that built the index, loaded when a search first needs it.
        Raises IndexFormatError, or EncoderMismatchError when `encoder` is of another embedding space.
        """
        gallery = _Gallery.open(Path(path).absolute())
        if encoder is not None:
            check_space(encoder, gallery.snapshot.manifest.encoder, index=gallery.snapshot.folder)
        return cls(gallery, encoder=encoder)

    def __len__(self) -> int:
        """Pictures that can be found."""
        return len(self._gallery.ids)

    @property
    def path(self) -> Path:
        """The index's folder, absolute."""
        return self._gallery.snapshot.folder

    @property
    def generation(self) -> int:
        """The generation that is searched."""
        return self._gallery.snapshot.manifest.generation

    @property
    def encoder(self) -> ElasticEncoder:
        """The encoder that queries are cut from; loaded on first use.

        Raises CheckpointError, EncoderMismatchError or MissingExtraError when it cannot be had.
        """
        return self._loaded(self._gallery)[0]

    def _loaded(self, gallery: _Gallery) -> tuple[ElasticEncoder, EncoderCache]:
        if self._submodels is None:
            with self._lock:
                if self._submodels is None:
                    encoder = load_encoder(gallery.snapshot.manifest.encoder, index=gallery.snapshot.folder)
                    self._submodels = encoder, EncoderCache(encoder)
        return self._submodels

    def reload(self) -> int:
        """Move on to the generation that counts now; returns its number.

        Raises IndexFormatError, or EncoderMismatchError when the folder now holds another encoder's index;
        the generation before is then kept.
        """
        with self._lock:
            gallery = _Gallery.open(self.path, reuse=self._gallery.snapshot)
            if self._submodels is not None:
                check_space(self._submodels[0], gallery.snapshot.manifest.encoder, index=self.path)
            self._gallery = gallery
        return gallery.snapshot.manifest.generation

    def search(self, image: ImageSource, *, encoder: QueryEncoder = "XL", k: int = 10) -> Hits:
        """The `k` pictures nearest to `image` (a path, encoded bytes, or a PIL image); fewer when there are fewer.

        `encoder`: a granularity, a spec string, a spec, or any encoder of the index's embedding space.
        Raises ImageError, SpecError, EncoderMismatchError, SearchError (k is no integer above 0, or `image` nothing
        that could be a picture), or what `Retriever.encoder` raises.
        """
        return self.search_many([image], encoder=encoder, k=k)[0]

    def search_many(
        self, images: Iterable[ImageSource], *, encoder: QueryEncoder = "XL", k: int = 10, batch_size: int = 32
    ) -> list[Hits]:
        """`search` for every one of `images`, `batch_size` of them encoded together; raises what it raises."""
        k, batch_size = _positive(k, name="k"), _positive(batch_size, name="batch_size")
        if isinstance(images, _PICTURE):  # a text would be taken for many paths of one letter
            raise SearchError(what="images is one picture", where="search_many", fix="give a list, or call search")
        gallery = self._gallery  # a reload by another thread does not mix generations
        ready = self._query_encoder(encoder, gallery)
        return [
            hits
            for batch in _batches(images, batch_size)
            for hits in _search_batch(batch, gallery=gallery, encoder=ready, k=k)
        ]

    def paths(self) -> dict[int, Path]:
        """The file of every picture that can be found, by id."""
        gallery = self._gallery
        return {
            int(number): gallery.snapshot.full_path(place)
            for number, place in zip(gallery.ids, gallery.places, strict=True)
        }

    def search_items(self, ids: Iterable[int], *, k: int = 10) -> list[Hits]:
        """`search` for pictures of the index, by id: their stored embeddings are taken, nothing is encoded.

        Each finds itself, too. Raises SearchError for an id that the index does not hold, or a bad `k`.
        """
        k, gallery = _positive(k, name="k"), self._gallery
        position = {int(number): row for row, number in enumerate(gallery.ids)}
        asked = list(ids)
        for number in asked:
            if number not in position:
                raise SearchError(what=f"holds no picture with id {number}", where=str(self.path), fix="see paths()")
        start = time.perf_counter()
        rows = np.array([position[number] for number in asked], dtype=np.int64)
        answers = [gallery.hits(*found) for found in gallery.vectors.search(gallery.vectors.vectors(rows), k=k)]
        each = 1000.0 * (time.perf_counter() - start) / max(1, len(asked))
        return [
            Hits(
                hits=hits,
                query=str(gallery.snapshot.full_path(gallery.places[row])),
                spec=gallery.snapshot.manifest.encoder.spec,
                runtime="index",
                generation=gallery.snapshot.manifest.generation,
                latency_ms=Latency(preprocess=0.0, encode=0.0, search=each, total=each),
            )
            for row, hits in zip(rows.tolist(), answers, strict=True)
        ]

    def _query_encoder(self, encoder: QueryEncoder, gallery: _Gallery) -> ImageEncoder:
        if isinstance(encoder, str | SubmodelSpec):
            encoder = self._loaded(gallery)[1].get(encoder)
        # Also one of ours: between two looks at it, the index may have been replaced by one of another space.
        check_space(encoder, gallery.snapshot.manifest.encoder, index=gallery.snapshot.folder)
        return encoder


def _positive(value: int, *, name: str) -> int:
    # A bool is an int to Python; numpy's integers are none, but mean one.
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < 1:
        raise SearchError(what=f"{name} is {value!r}", where="search", fix=f"give a {name} of 1 or more")
    return index(value)


def _batches(images: Iterable[ImageSource], size: int) -> Iterator[list[ImageSource]]:
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        for image in batch:
            if not isinstance(image, _PICTURE):
                raise SearchError(
                    what=f"a {type(image).__name__} is no picture",
                    where="search",
                    fix="give a path, a file's bytes, or a PIL image",
                )
        yield batch


def _search_batch(images: Sequence[ImageSource], *, gallery: _Gallery, encoder: ImageEncoder, k: int) -> Iterator[Hits]:
    start = time.perf_counter()
    pixels = encoder.preprocess(images)
    preprocessed = time.perf_counter()
    queries = _checked(encoder.encode(pixels), rows=len(images), dim=gallery.snapshot.manifest.encoder.embedding_dim)
    encoded = time.perf_counter()
    answers = [gallery.hits(*found) for found in gallery.vectors.search(queries, k=k)]
    searched = time.perf_counter()
    share = 1000.0 / len(images)  # seconds of the batch -> milliseconds of one query
    latency = Latency(
        preprocess=(preprocessed - start) * share,
        encode=(encoded - preprocessed) * share,
        search=(searched - encoded) * share,
        total=(searched - start) * share,
    )
    for image, hits in zip(images, answers, strict=True):
        yield Hits(
            hits=hits,
            query=None if isinstance(image, bytes | Image.Image) else os.fspath(image),
            spec=str(encoder.spec),
            runtime=encoder.runtime,
            generation=gallery.snapshot.manifest.generation,
            latency_ms=latency,
        )


def _checked(queries: FloatArray, *, rows: int, dim: int) -> FloatArray:
    check_shape(queries, rows=rows, dim=dim)
    if not is_unit(queries).all():
        raise EmbeddingError(
            what="gave an embedding that is not finite or not of unit length",
            where="encoder",
            fix="search with another submodel, or check the checkpoint with: matvit verify",
        )
    return normalised(queries)
