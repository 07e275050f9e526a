"""Searching an index with any submodel of the encoder that built it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from operator import index
from pathlib import Path

import numpy as np

from matvit.encoder import ElasticEncoder, ImageEncoder, lengths, near_one
from matvit.errors import ImageError
from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from matvit.progress import Progress, silent
from matvit.spec import SubmodelSpec
from retrieval.arguments import is_number, is_whole
from retrieval.choosing import AUTO, Chooser, Limits
from retrieval.duplicates import linked
from retrieval.encoders import EncoderCache, check_encoder, check_query_encoder, check_shape, load_encoder, normalised
from retrieval.errors import EmbeddingError, SearchError
from retrieval.exact import Found
from retrieval.files import index_folder, sha256_bytes
from retrieval.filters import Scalar, Where
from retrieval.flat import exact_scores
from retrieval.gallery import Gallery
from retrieval.locations import read_picture
from retrieval.manifest import read_pointer
from retrieval.queries import (
    PICTURE_TYPES,
    Asked,
    Query,
    check,
    depth,
    embeddings,
    fuse_ranks,
    mean,
    name_of,
    own_positions,
    preprocess_all,
)
from retrieval.types import Duplicate, DuplicateGroup, Hit, Hits, Latency

QueryEncoder = str | SubmodelSpec | ImageEncoder
_name = lru_cache(maxsize=256)(str)  # of a spec: naming one takes as long as looking up some hits
_ROUNDING = 1e-6  # the inner product of two embeddings of unit length in float32 may be so much less than it is


class Retriever:
    """Searches one generation of an index, the one that counted when it was opened; `reload` moves on.

    May be shared by threads.
    """

    def __init__(self, gallery: Gallery, *, encoder: ElasticEncoder | None) -> None:
        self._served = _Served(gallery=gallery, encoder=_Encoder(gallery, given=encoder))
        self._reloading = threading.Lock()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, encoder: ElasticEncoder | None = None, search_device: str = "cpu"
    ) -> Retriever:
        """Open an index for searching, every byte checked; its paths are read into memory, its vectors too if they are
        searched exactly.

        `encoder` None: the one that built the index, loaded when a search first needs it. `search_device` "cuda" or
        "cuda:1": every vector is compared on that GPU, whatever the index's type; the answers are the same.
        Raises IndexFormatError, EncoderMismatchError when `encoder` is of another embedding space, or SearchError when
        there is no such device.
        """
        gallery = Gallery.open(index_folder(path), device=search_device)
        if encoder is not None:
            check_encoder(encoder, gallery.snapshot.manifest.encoder, index=gallery.snapshot.folder)
        return cls(gallery, encoder=encoder)

    def __repr__(self) -> str:
        return f"<Retriever {self.path}: {self._gallery.snapshot}>"

    @property
    def _gallery(self) -> Gallery:
        return self._served.gallery

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
        return self._served.encoder.loaded().elastic

    def reload(self) -> int:
        """Move on to the generation that counts now, at once if it is the same; returns its number.

        Where the index was upgraded, an encoder that was loaded for it gives way to the new one. Raises
        IndexFormatError, or EncoderMismatchError when `open` was given an encoder and the folder now holds another
        one's index; the generation before is then kept.
        """
        with self._reloading:
            served = self._served
            if read_pointer(self.path) == served.gallery.snapshot.pointer:
                return self.generation
            gallery = Gallery.open(self.path, device=served.gallery.device, reuse=served.gallery.snapshot)
            self._served = _Served(gallery=gallery, encoder=served.encoder.of(gallery))
        return gallery.snapshot.manifest.generation

    def search(
        self,
        query: Query,
        *,
        encoder: QueryEncoder | None = None,
        max_latency_ms: float | None = None,
        min_recall: float | None = None,
        k: int | None = 10,
        min_score: float | None = None,
        where: Where | None = None,
        exclude_self: bool = False,
    ) -> Hits:
        """The `k` pictures nearest to `query`, best first, equal scores by id; fewer when there are fewer.

        `query`: a picture (a path, which may be one inside a shard or a table, or a URL, as hits have them; encoded
        bytes; or a PIL image), the id of an item (its stored embedding is taken,
        nothing is encoded), or several of those as a `Blend`.
        `encoder`: a granularity, a spec string, a spec, any encoder of the index's embedding space, or "auto".
        "auto" chooses by the checkpoint's table, an estimate by its own pictures: the cheapest submodel that keeps
        `min_recall` of XL's recall@1 (0.98); with `max_latency_ms`, for preprocessing and encoding a JPEG of 640 x 480
        on this machine, the one that finds most within it. None: "auto" where there is such a limit, else XL.
        `k` None: all. `min_score`: only hits that score at least this, to a millionth: float32 rounds embeddings, and
        so a picture may score 0.9999999 with itself.
        `where`: only pictures whose metadata is so, such as {"label": ["cat", "dog"], "price": {">=": 3, "<": 5}}.
        A number as a bound compares with texts that spell one, too, and leaves out the others.
        `exclude_self`: not the query's own picture, nor files with the same content.
        Raises ImageError, SpecError, EncoderMismatchError, SearchError (an argument that cannot be meant, an id that
        the index does not hold, a name that no picture has, limits that no submodel keeps), or what
        `Retriever.encoder` raises.
        """
        return self.search_many(
            [query],
            encoder=encoder,
            max_latency_ms=max_latency_ms,
            min_recall=min_recall,
            k=k,
            min_score=min_score,
            where=where,
            exclude_self=exclude_self,
        )[0]

    def search_many(
        self,
        queries: Iterable[Query],
        *,
        encoder: QueryEncoder | None = None,
        max_latency_ms: float | None = None,
        min_recall: float | None = None,
        k: int | None = 10,
        min_score: float | None = None,
        where: Where | None = None,
        exclude_self: bool = False,
        batch_size: int = 32,
    ) -> list[Hits]:
        """`search` for every one of `queries`, `batch_size` of them encoded together; raises what it raises."""
        batch_size = _positive(batch_size, name="batch_size")
        # A text would be many paths of one letter.
        if isinstance(queries, PICTURE_TYPES) or not isinstance(queries, Iterable):
            raise SearchError(
                what=f"a {type(queries).__name__} is no list", where="search_many", fix="give a list, or call search"
            )
        served = self._served  # a reload by another thread mixes neither generations nor encoders
        gallery = served.gallery
        encoder, limits = _asked(encoder, max_latency_ms, min_recall)
        search = _Search(
            gallery=gallery,
            k=None if k is None else _positive(k, name="k"),
            min_score=_score(min_score),
            within=gallery.allowed(where),
            exclude_self=exclude_self,
        )
        answers: list[Hits] = []
        remaining = iter(queries)
        while batch := [check(query, gallery) for query in islice(remaining, batch_size)]:
            ready = served.query_encoder(encoder, limits) if any(asked.pictures for asked in batch) else None
            answers += search.run(batch, encoder=ready)
        return answers

    def duplicates(self, *, min_score: float | None = 0.95, progress: Progress = silent) -> list[DuplicateGroup]:
        """Groups of pictures that look the same, by the id of each group's first.

        Linked are files of the same content, and pictures whose cosine similarity is at least `min_score`, to a
        millionth (None: the former only); a group is all that links reach. Every pair is compared: time grows with
        the square of the index, memory does not. Raises SearchError.
        """
        gallery, score = self._gallery, _score(min_score)
        same = (positions for positions in gallery.by_digest.values() if len(positions) > 1)
        groups = [
            _group(gallery, positions)
            for positions in linked(gallery.vectors, same=same, min_score=score, progress=progress)
        ]
        return sorted(groups, key=lambda group: group[0].id)

    def read_picture(self, number: int) -> bytes:
        """The encoded bytes of the picture with this id, as it was indexed, also of one in a shard or a store.

        Raises SearchError for an id that the index does not hold, ImageError when its file cannot be read, or has
        changed: by its path alone, another picture would pass for the one that was found.
        """
        gallery = self._gallery
        position = gallery.position_of(number)
        place = gallery.snapshot.file_name(gallery.places[position])
        data = read_picture(place)
        if bytes.fromhex(sha256_bytes(data)) != gallery.digests[position]:
            raise ImageError(what="has changed since it was indexed", where=place, fix="put it back, or index it again")
        return data

    def paths(self) -> dict[int, Path]:
        """The file of every picture that can be found, by id."""
        gallery = self._gallery
        return {number: gallery.path(position) for number, position in gallery.positions.items()}

    def values(self, name: str) -> list[Scalar]:
        """What pictures have under a metadata name and `where` can ask for, the most frequent first.

        Raises SearchError for a name that no picture has, if there are pictures.
        """
        return self._gallery.values(name)

    def query_encoder(
        self,
        encoder: QueryEncoder | None = None,
        *,
        max_latency_ms: float | None = None,
        min_recall: float | None = None,
        progress: Progress = silent,
    ) -> ImageEncoder:
        """What `search` encodes pictures with, given the same; its first call takes much longer than later ones."""
        return self._served.query_encoder(*_asked(encoder, max_latency_ms, min_recall), progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """The encoder that queries are cut from, and what was cut."""

    elastic: ElasticEncoder
    submodels: EncoderCache
    chooser: Chooser

    @classmethod
    def of(cls, elastic: ElasticEncoder) -> _Loaded:
        submodels = EncoderCache(elastic)
        return cls(elastic=elastic, submodels=submodels, chooser=Chooser(elastic, submodels))


class _Encoder:
    """The encoder of galleries of one embedding space, loaded when it is first needed. Safe from any thread."""

    def __init__(self, gallery: Gallery, *, given: ElasticEncoder | None = None) -> None:
        self._entry, self._index = gallery.snapshot.manifest.encoder, gallery.snapshot.folder
        self._given = given
        self._loaded = None if given is None else _Loaded.of(given)
        self._loading = threading.Lock()

    def loaded(self) -> _Loaded:
        """Raises what `load_encoder` raises."""
        with self._loading:
            if self._loaded is None:
                self._loaded = _Loaded.of(load_encoder(self._entry, index=self._index))
            return self._loaded

    def of(self, gallery: Gallery) -> _Encoder:
        """That of another gallery: this one, if it can be. Raises EncoderMismatchError if it was given and cannot."""
        entry = gallery.snapshot.manifest.encoder
        if self._given is not None:
            check_encoder(self._given, entry, index=self._index)
        has_it = self._loaded is not None and entry.space_id == self._entry.space_id
        return self if has_it or entry == self._entry else _Encoder(gallery)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """One generation, and the encoder that goes with it."""

    gallery: Gallery
    encoder: _Encoder

    def query_encoder(self, asked: QueryEncoder, limits: Limits, progress: Progress = silent) -> ImageEncoder:
        if isinstance(asked, str | SubmodelSpec):
            loaded = self.encoder.loaded()
            asked = loaded.submodels.get(loaded.chooser.spec(limits, progress) if asked == AUTO else asked)
        # Also one of ours: what was given may have been trained on since.
        check_query_encoder(asked, self.gallery.snapshot.manifest.encoder, index=self.gallery.snapshot.folder)
        return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What is asked of every query of one call."""

    gallery: Gallery
    k: int | None
    min_score: float | None
    within: IntArray | None  # positions
    exclude_self: bool

    def run(self, batch: Sequence[Asked], *, encoder: ImageEncoder | None) -> list[Hits]:
        """The answers to `batch`; `encoder` None: there is no picture in it."""
        pictures = [picture for asked in batch for picture in asked.pictures]
        start = time.perf_counter()
        pixels = preprocess_all(pictures, encoder) if encoder else None
        preprocessed = time.perf_counter()
        encoded = self._encoded(encoder, pixels, rows=len(pictures))
        done = time.perf_counter()
        answers = [self.gallery.hits(found) for found in self._found(batch, encoded)]
        searched = time.perf_counter()
        # Seconds of the batch -> milliseconds of one query; items take none of the encoder's time.
        each, with_pictures = 1000.0 / len(batch), 1000.0 / max(1, sum(bool(asked.pictures) for asked in batch))
        return [
            self._hits(
                asked,
                hits,
                encoder=encoder if asked.pictures else None,
                preprocess=(preprocessed - start) * with_pictures,
                encode=(done - preprocessed) * with_pictures,
                search=(searched - done) * each,
            )
            for asked, hits in zip(batch, answers, strict=True)
        ]

    def _encoded(self, encoder: ImageEncoder | None, pixels: FloatArray | None, *, rows: int) -> Iterator[FloatArray]:
        if encoder is None or pixels is None:
            return iter(())
        dim = self.gallery.snapshot.manifest.encoder.embedding_dim
        return iter(_checked(encoder.encode(pixels), rows=rows, dim=dim))

    def _found(self, batch: Sequence[Asked], encoded: Iterator[FloatArray]) -> Iterator[Found]:
        parts = [embeddings(asked, encoded, self.gallery) for asked in batch]
        own = [own_positions(asked, self.gallery) if self.exclude_self else set[int]() for asked in batch]
        blended = [number for number, asked in enumerate(batch) if asked.blend.fusion == "mean"]
        nearest = iter(
            self.gallery.nearest(
                np.stack([mean(batch[number], parts[number]) for number in blended]),
                k=self.k,
                min_score=self.min_score,
                within=self.within,
                without=[own[number] for number in blended],
            )
            if blended
            else ()
        )
        for asked, part, without in zip(batch, parts, own, strict=True):
            yield next(nearest) if asked.blend.fusion == "mean" else self._by_rank(asked, part, without)

    def _by_rank(self, asked: Asked, parts: FloatArray, without: set[int]) -> Found:
        answers = self.gallery.nearest(
            parts, k=depth(self.k), min_score=None, within=self.within, without=[without] * len(parts)
        )
        positions, votes = fuse_ranks(asked, answers, ids=self.gallery.ids, k=self.k)
        enough = votes >= (-np.inf if self.min_score is None else self.min_score)
        return positions[enough], votes[enough]

    def _hits(
        self,
        asked: Asked,
        hits: tuple[Hit, ...],
        *,
        encoder: ImageEncoder | None,
        preprocess: float,
        encode: float,
        search: float,
    ) -> Hits:
        if encoder is None:
            preprocess = encode = 0.0
        manifest = self.gallery.snapshot.manifest
        return Hits(
            hits=hits,
            query=name_of(asked, self.gallery),
            spec=_name(encoder.spec) if encoder else manifest.encoder.spec,
            runtime=encoder.runtime if encoder else "index",
            generation=manifest.generation,
            latency_ms=Latency(preprocess=preprocess, encode=encode, search=search, total=preprocess + encode + search),
        )


def _asked(
    encoder: QueryEncoder | None, max_latency_ms: float | None, min_recall: float | None
) -> tuple[QueryEncoder, Limits]:
    limits = Limits(max_latency_ms=max_latency_ms, min_recall=min_recall)
    if encoder is None:
        encoder = AUTO if limits else "XL"
    elif limits and encoder != AUTO:
        raise SearchError(
            what="an encoder and limits are both given", where="search", fix=f"leave out one, or give {AUTO!r}"
        )
    return encoder, limits


def _group(gallery: Gallery, positions: IntArray) -> DuplicateGroup:
    ordered = positions[np.argsort(gallery.ids[positions])]
    vectors = gallery.vectors.vectors(ordered)
    scores = exact_scores(vectors, vectors[0])
    return DuplicateGroup(
        pictures=tuple(
            Duplicate(
                id=int(gallery.ids[position]),
                path=gallery.path(position),
                score=min(1.0, max(-1.0, score)),
                same_content=gallery.digests[position] == gallery.digests[int(ordered[0])],
                is_link=Path(gallery.path(position)).is_symlink(),
            )
            for position, score in zip(ordered.tolist(), scores.tolist(), strict=True)
        )
    )


def _score(value: float | None) -> float | None:
    if value is not None and not (is_number(value) and -1 <= value <= 1):  # also refuses NaN
        raise SearchError(what=f"min_score is {value!r}", where="search", fix="give a number from -1 to 1")
    return None if value is None else value - _ROUNDING


def _positive(value: int, *, name: str) -> int:
    if not is_whole(value) or not 1 <= index(value) <= sys.maxsize:
        raise SearchError(what=f"{name} is {value!r}", where="search", fix=f"give a {name} from 1 to {sys.maxsize}")
    return index(value)


def _checked(queries: FloatArray, *, rows: int, dim: int) -> FloatArray:
    check_shape(queries, rows=rows, dim=dim)
    found = lengths(queries)
    if not near_one(found).all():
        raise EmbeddingError(
            what="gave an embedding that is not finite or not of unit length",
            where="encoder",
            fix="search with another submodel, or check the checkpoint with: matvit verify",
        )
    return normalised(queries, found)
