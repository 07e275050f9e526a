"""The cross-test: how well each query encoder finds the right class in each gallery encoder's index; no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from matvit.datasets import LabelledImages
from matvit.encoder import ElasticEncoder, ImageEncoder
from matvit.errors import DatasetError, ImageError
from matvit.metrics import NO_HIT, IntArray, agreement, average_precision, bootstrap_interval, recall_at_k, top_k
from matvit.preprocess import FloatArray, ImageSource, open_image, resize_centre_square
from matvit.progress import Progress, ProgressEvent, silent
from matvit.spec import SubmodelSpec

NEAR_COPY_BITS = 3  # pictures whose 64-bit difference hashes differ in at most these many bits
_HASH_PIXELS = 112
_DEPTH = 100  # hits that are looked at
_DECODERS = 2  # threads
_BATCHES_AHEAD = 2  # decoded while the encoder works; bounds the memory held


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedLoss:
    """Recall@1 of the full encoder minus that of a submodel, over the same queries and gallery.

    In points (100 x), positive where the submodel is worse, with a 95 % bootstrap interval over queries.
    """

    points: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one query encoder finds in one gallery: means over `n_queries`, each 0 to 1."""

    recall_at_1: float
    recall_at_10: float
    map_at_100: float
    agreement_at_10: float  # share of the full encoder's first 10 hits, in the same gallery, also found
    n_queries: int
    loss: PairedLoss

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types under the names that tables use."""
        return {
            "recall@1": self.recall_at_1,
            "recall@10": self.recall_at_10,
            "map@100": self.map_at_100,
            "agreement@10": self.agreement_at_10,
            "n_queries": self.n_queries,
            "loss": asdict(self.loss),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedPicture:
    """A picture that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTest:
    """The cross-test matrix, with what was left out of it."""

    queries: str  # names of the data sets; equal for leave-one-out
    gallery: str
    matrix: Mapping[str, Mapping[str, Quality]]  # query spec -> gallery spec -> quality
    flops: Mapping[str, int]  # per spec string, one picture; the full encoder's too
    near_copies: int  # queries left out because the gallery holds nearly the same picture
    without_match: int  # queries left out because the gallery holds no other picture of their class
    skipped: tuple[SkippedPicture, ...]

    def to_json(self) -> dict[str, Any]:
        """The form that `matvit eval --json` prints."""
        return {
            "queries": self.queries,
            "gallery": self.gallery,
            "matrix": {
                query: {gallery: quality.to_json() for gallery, quality in row.items()}
                for query, row in self.matrix.items()
            },
            "flops": dict(self.flops),
            "near_copies": self.near_copies,
            "without_match": self.without_match,
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }


def cross_test(
    encoder: ElasticEncoder,
    queries: LabelledImages,
    gallery: LabelledImages | None,
    *,
    query_specs: Sequence[str | SubmodelSpec],
    gallery_specs: Sequence[str | SubmodelSpec],
    drop_near_copies: bool = True,
    limit: int | None = None,
    batch_size: int = 64,
    flops: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> CrossTest:
    """Embeds both data sets with every spec and measures each (query spec, gallery spec) pair.

    Without a `gallery`, each query searches all other queries (leave-one-out). Classes are matched by
    name. `limit` keeps that many queries, evenly spread over the data set. Queries are left out, and
    counted, when the gallery holds a near-copy of them (`drop_near_copies`; not in leave-one-out) or
    no other picture of their class. `flops` maps spec strings to the cost that the result repeats.

    Every picture is decoded once per resolution and streamed through the encoders, so that only
    embeddings are kept. Raises SpecError for a spec that the encoder lacks, and DatasetError when no
    query is left; pictures that cannot be read are skipped and listed.
    """
    full = encoder.shape.spec()
    asked = list(dict.fromkeys(encoder.shape.spec(spec) for spec in query_specs))
    indexed = list(dict.fromkeys(encoder.shape.spec(spec) for spec in gallery_specs))
    embedder = _Embedder(
        encoders={spec: encoder.encoder(spec) for spec in {full, *asked, *indexed}},
        hashing=drop_near_copies and gallery is not None,
        batch_size=batch_size,
        progress=progress,
    )
    if gallery is None:
        found = embedder.embed(queries, _evenly(len(queries), None), [full, *asked, *indexed], stage="embed pictures")
        own = _evenly(len(found), limit)  # the queries' own rows in the gallery
        asking, skipped = found.take(own), found.skipped
    else:
        asking = embedder.embed(queries, _evenly(len(queries), limit), [full, *asked], stage="embed queries")
        found = embedder.embed(gallery, _evenly(len(gallery), None), indexed, stage="embed gallery")
        own = np.full(len(asking), NO_HIT, dtype=np.int64)
        skipped = asking.skipped + found.skipped

    labels = _gallery_labels(asking.labels, queries.class_names, (gallery or queries).class_names)
    relevant = _count_of(labels, found.labels) - (own != NO_HIT)
    copies = _near_copies(asking.hashes, found.hashes)
    matched = relevant > 0
    kept = np.flatnonzero(matched & ~copies)
    if not len(kept):
        raise DatasetError(
            what=f"no query is left: {copies.sum()} of {len(asking)} are near-copies of a gallery picture, "
            f"{(~matched).sum()} have no other picture of their class to find, {len(skipped)} pictures are unreadable",
            where=queries.name,
            fix="give queries and a gallery that show the same classes in different pictures",
        )
    task = _Task(labels=labels[kept], relevant=relevant[kept], own=own[kept], gallery_labels=found.labels)
    return CrossTest(
        queries=queries.name,
        gallery=(gallery or queries).name,
        matrix=_matrix(task, asking.take(kept).vectors, found.vectors, asked, indexed),
        flops={str(spec): flops[str(spec)] for spec in [full, *asked, *indexed] if flops and str(spec) in flops},
        near_copies=int(copies.sum()),
        without_match=int((~matched & ~copies).sum()),
        skipped=skipped,
    )


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be found: Q queries, in a gallery of M pictures."""

    labels: IntArray  # (Q,) the queries' classes
    relevant: IntArray  # (Q,) gallery pictures of that class, without the query
    own: IntArray  # (Q,) the query's own gallery row, or NO_HIT
    gallery_labels: IntArray  # (M,)

    def search(self, queries: FloatArray, gallery: FloatArray) -> IntArray:
        """(Q, D), (M, D) -> (Q, min(100, M)) gallery rows, best first."""
        return top_k(queries, gallery, _DEPTH, exclude=self.own)[1]

    def quality(self, hits: IntArray, full_hits: IntArray) -> Quality:
        """Measures the hits of one encoder, beside the full encoder's in the same gallery."""
        hit_labels = self._labels_of(hits)
        recall = recall_at_k(hit_labels, self.labels, 1)
        lost = 100.0 * (recall_at_k(self._labels_of(full_hits), self.labels, 1).astype(np.float64) - recall)
        low, high = bootstrap_interval(lost)
        return Quality(
            recall_at_1=float(recall.mean()),
            recall_at_10=float(recall_at_k(hit_labels, self.labels, 10).mean()),
            map_at_100=float(average_precision(hit_labels, self.labels, self.relevant, k=_DEPTH).mean()),
            agreement_at_10=float(agreement(hits[:, :10], full_hits[:, :10]).mean()),
            n_queries=len(hits),
            loss=PairedLoss(points=float(lost.mean()), low=low, high=high),
        )

    def _labels_of(self, hits: IntArray) -> IntArray:
        return np.where(hits == NO_HIT, -1, self.gallery_labels[hits])


def _matrix(
    task: _Task,
    queries: Mapping[SubmodelSpec, FloatArray],
    gallery: Mapping[SubmodelSpec, FloatArray],
    asked: Sequence[SubmodelSpec],
    indexed: Sequence[SubmodelSpec],
) -> dict[str, dict[str, Quality]]:
    full = next(iter(queries)).shape.spec()
    matrix: dict[str, dict[str, Quality]] = {str(query): {} for query in asked}
    for index in indexed:
        full_hits = task.search(queries[full], gallery[index])
        for query in asked:
            hits = full_hits if query == full else task.search(queries[query], gallery[index])
            matrix[str(query)][str(index)] = task.quality(hits, full_hits)
    return matrix


def _gallery_labels(labels: IntArray, names: Sequence[str], gallery_names: Sequence[str]) -> IntArray:
    """Labels into `names` -> labels into `gallery_names`, -1 where that class is not in the gallery."""
    position = {name: index for index, name in enumerate(gallery_names)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64)[labels]


def _count_of(labels: IntArray, gallery_labels: IntArray) -> IntArray:
    """(Q,), (M,) -> (Q,): how often each label occurs in the gallery."""
    ordered = np.sort(gallery_labels)
    return np.searchsorted(ordered, labels, side="right") - np.searchsorted(ordered, labels, side="left")


def _evenly(count: int, limit: int | None) -> IntArray:
    """`limit` (None: all) of `count` positions, evenly spread: a sorted data set keeps all its classes."""
    return np.linspace(0, count - 1, min(count, limit or count)).round().astype(np.int64)


# --- near-copies --------------------------------------------------------------------------------


def difference_hash(image: ImageSource) -> FloatArray:
    """The 64-bit dHash of the centre square that an encoder sees, as (64,) float32 of -1 and 1.

    In this form an inner product is 64 - 2 x the number of bits that differ. Raises ImageError.
    """
    grey = resize_centre_square(open_image(image, draft_size=2 * _HASH_PIXELS).convert("L"), _HASH_PIXELS)
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return np.where(small[:, 1:] > small[:, :-1], 1, -1).astype(np.float32).ravel()


def _near_copies(hashes: FloatArray, gallery_hashes: FloatArray) -> npt.NDArray[np.bool_]:
    """(Q, 64), (M, 64) -> (Q,) bool: the gallery holds nearly the same picture. All False without hashes."""
    if not (hashes.size and gallery_hashes.size):
        return np.zeros(len(hashes), dtype=np.bool_)
    nearest, _ = top_k(hashes, gallery_hashes, 1)
    return np.asarray(nearest[:, 0] >= hashes.shape[1] - 2 * NEAR_COPY_BITS)


# --- embedding ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Embedded:
    """The N readable pictures of a data set."""

    labels: IntArray  # (N,)
    hashes: FloatArray  # (N, 64), or (N, 0) when near-copies do not matter
    vectors: Mapping[SubmodelSpec, FloatArray]  # (N, D) each
    skipped: tuple[SkippedPicture, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: IntArray) -> _Embedded:
        """The pictures at these positions."""
        return _Embedded(
            labels=self.labels[positions],
            hashes=self.hashes[positions],
            vectors={spec: vectors[positions] for spec, vectors in self.vectors.items()},
            skipped=self.skipped,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    label: int
    pixels: Mapping[int, FloatArray]  # resolution -> (3, H, W)
    hash: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Embedder:
    """Streams pictures through several encoders of one elastic encoder, batch by batch."""

    encoders: Mapping[SubmodelSpec, ImageEncoder]
    hashing: bool
    batch_size: int
    progress: Progress

    def embed(self, images: LabelledImages, rows: IntArray, specs: Iterable[SubmodelSpec], *, stage: str) -> _Embedded:
        """Embeds the pictures at `rows` with each spec; unreadable ones are listed instead."""
        encoders = {spec: self.encoders[spec] for spec in specs}
        batches: dict[SubmodelSpec, list[FloatArray]] = {spec: [] for spec in encoders}
        labels: list[int] = []
        hashes: list[FloatArray] = []
        skipped: list[SkippedPicture] = []
        for batch in self._decoded(images, rows, encoders):
            readable = [picture for picture in batch if isinstance(picture, _Decoded)]
            skipped += [picture for picture in batch if isinstance(picture, SkippedPicture)]
            labels += [picture.label for picture in readable]
            hashes += [picture.hash for picture in readable]
            for spec, vectors in _encode(readable, encoders):
                batches[spec].append(vectors)
            note = f"{len(skipped)} skipped" if skipped else ""
            done = len(labels) + len(skipped)
            self.progress(ProgressEvent(stage=stage, done=done, total=len(rows), unit="picture", note=note))
        return _Embedded(
            labels=np.array(labels, dtype=np.int64),
            hashes=np.array(hashes, dtype=np.float32).reshape(len(labels), -1 if labels else 0),
            vectors={
                spec: np.concatenate([np.empty((0, encoders[spec].embedding_dim), np.float32), *parts])
                for spec, parts in batches.items()
            },
            skipped=tuple(skipped),
        )

    def _decoded(
        self, images: LabelledImages, rows: IntArray, encoders: Mapping[SubmodelSpec, ImageEncoder]
    ) -> Iterator[list[_Decoded | SkippedPicture]]:
        by_size = {spec.image_size: encoder for spec, encoder in encoders.items()}
        with ThreadPoolExecutor(_DECODERS) as pool:
            waiting: deque[list[Future[_Decoded | SkippedPicture]]] = deque()
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                waiting.append([pool.submit(self._decode, images, int(row), by_size) for row in batch])
                if len(waiting) > _BATCHES_AHEAD:
                    yield [picture.result() for picture in waiting.popleft()]
            for rest in waiting:
                yield [picture.result() for picture in rest]

    def _decode(
        self, images: LabelledImages, row: int, by_size: Mapping[int, ImageEncoder]
    ) -> _Decoded | SkippedPicture:
        image = images.images[row]
        try:
            return _Decoded(
                label=int(images.labels[row]),
                pixels={size: encoder.preprocess([image])[0] for size, encoder in by_size.items()},
                hash=difference_hash(image) if self.hashing else np.empty(0, dtype=np.float32),
            )
        except ImageError as error:
            return SkippedPicture(path=images.origins[row], reason=error.what)


def _encode(
    pictures: Sequence[_Decoded], encoders: Mapping[SubmodelSpec, ImageEncoder]
) -> Iterator[tuple[SubmodelSpec, FloatArray]]:
    if not pictures:
        return
    for size in {spec.image_size for spec in encoders}:
        pixels = np.stack([picture.pixels[size] for picture in pictures])
        for spec, encoder in encoders.items():
            if spec.image_size == size:
                yield spec, encoder.encode(pixels)
