"""Encoders as the index sees them: which built it, which may search it, and a small cache of extracted ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from matvit.encoder import ElasticEncoder, ImageEncoder, lengths
from matvit.errors import CheckpointError
from matvit.preprocess import FloatArray
from matvit.spec import SubmodelSpec
from retrieval.errors import EmbeddingError, EncoderMismatchError
from retrieval.manifest import EncoderEntry


def describe(encoder: ElasticEncoder) -> EncoderEntry:
    """The manifest's entry for a gallery embedded by all of `encoder`.

    Raises EncoderMismatchError unless it is a whole encoder.
    """
    _check_whole(encoder)
    spec = encoder.shape.spec()
    return EncoderEntry(
        name=encoder.name,
        source=encoder.source,
        revision=encoder.revision,
        space_id=encoder.space_id,
        weights_sha256=encoder.weights_sha256,
        spec=str(spec),
        resolution=spec.image_size,
        embedding_dim=encoder.embedding_dim,
    )


def moved_encoder(encoder: ElasticEncoder, entry: EncoderEntry) -> EncoderEntry | None:
    """`entry` with the place of `encoder`, if that is the same and lies elsewhere; else None.

    Raises EncoderMismatchError unless it is a whole encoder.
    """
    found = describe(encoder)
    places = {name: getattr(found, name) for name in ("name", "source", "revision", "weights_sha256")}
    moved = entry.model_copy(update=places)
    return moved if found.space_id == entry.space_id and found.source is not None and moved != entry else None


def load_encoder(entry: EncoderEntry, *, index: Path) -> ElasticEncoder:
    """The encoder that built the index. Raises CheckpointError, EncoderMismatchError or MissingExtraError."""
    if entry.source is None:
        raise CheckpointError(
            what=f"the encoder '{entry.name}' that built this index was never saved",
            where=str(index),
            fix="pass encoder= (--checkpoint at the command line)",
        )
    from matvit import MatViT

    try:
        encoder: ElasticEncoder = MatViT.from_pretrained(entry.source, revision=entry.revision)
    except CheckpointError as error:
        raise CheckpointError(
            what=f"the encoder that built this index cannot be loaded from '{entry.source}' ({error.what})",
            where=str(index),
            fix="put it back there, or pass encoder= (--checkpoint at the command line); Index.upgrade, or matvit "
            "upgrade, notes its new place once and for all",
        ) from error
    check_encoder(encoder, entry, index=index)
    return encoder


def check_encoder(encoder: ElasticEncoder, entry: EncoderEntry, *, index: Path) -> None:
    """Raises EncoderMismatchError unless it is a whole encoder whose embeddings may be compared with the index's."""
    _check_whole(encoder)
    _check_space(encoder, entry, index)


def check_query_encoder(encoder: ImageEncoder, entry: EncoderEntry, *, index: Path) -> None:
    """Raises EncoderMismatchError unless it is one submodel whose embeddings may be compared with the index's."""
    if not _is_submodel(encoder):
        raise EncoderMismatchError(
            what=f"{encoder!r} is {'a whole encoder, not one submodel' if _is_whole(encoder) else 'no encoder'}",
            where="encoder",
            fix='name a submodel, such as "S", or give one: model.encoder("S")',
        )
    _check_space(encoder, entry, index)


def _check_whole(encoder: object) -> None:
    if not _is_whole(encoder):
        raise EncoderMismatchError(
            what=f"{encoder!r} is {'one submodel, not a whole encoder' if _is_submodel(encoder) else 'no encoder'}",
            where="encoder",
            fix='load one: MatViT.from_pretrained("matvit-small"); a search also takes a spec such as "S"',
        )


def _is_whole(encoder: object) -> bool:
    return callable(getattr(encoder, "encoder", None)) and hasattr(encoder, "shape")


def _is_submodel(encoder: object) -> bool:
    return callable(getattr(encoder, "preprocess", None)) and callable(getattr(encoder, "encode", None))


def _check_space(encoder: ElasticEncoder | ImageEncoder, entry: EncoderEntry, index: Path) -> None:
    space_id = encoder.space_id  # asked for once: it may be a hash of all weights
    if space_id != entry.space_id or encoder.embedding_dim != entry.embedding_dim:
        raise EncoderMismatchError(
            what=f"the encoder's embedding space {space_id:.12} is not this index's {entry.space_id:.12}",
            where=str(index),
            fix=f"use the encoder that built the index ({entry.source or entry.name}), "
            "or change the index over to this one: Index.upgrade, or matvit upgrade at the command line",
        )


def check_shape(embeddings: FloatArray, *, rows: int, dim: int) -> None:
    """Raises EmbeddingError unless `embeddings` is (rows, dim) float32."""
    if embeddings.shape != (rows, dim) or embeddings.dtype != np.float32:
        raise EmbeddingError(
            what=f"gave embeddings {embeddings.dtype}{embeddings.shape} instead of float32{(rows, dim)}",
            where="encoder",
            fix="check the encoder, or open the index with the one that built it",
        )


def normalised(embeddings: FloatArray, by: npt.NDArray[np.float64] | None = None) -> FloatArray:
    """(N, D) of about unit length -> (N, D) float32 of unit length: scores are cosines whatever the runtime's width.

    `by`: their lengths (N,), where they are known.
    """
    by = lengths(embeddings) if by is None else by
    unit: FloatArray = (embeddings / by[..., np.newaxis]).astype(np.float32)
    return unit


class EncoderCache:
    """The last few submodels that were extracted from one elastic encoder, by spec. Safe from any thread."""

    def __init__(self, elastic: ElasticEncoder, *, size: int = 8) -> None:
        self._elastic = elastic
        self._spec = lru_cache(maxsize=256)(elastic.shape.spec)  # parsing one takes longer than a small search
        self._size = size
        self._kept: OrderedDict[SubmodelSpec, ImageEncoder] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, value: str | SubmodelSpec) -> ImageEncoder:
        """The submodel named by a granularity, a spec string or a spec. Raises SpecError."""
        spec = self._spec(value)
        with self._lock:
            if spec not in self._kept:
                self._kept[spec] = self._elastic.encoder(spec)
                if len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(spec)
            return self._kept[spec]
