"""What the index and the retriever hand back: frozen values, no behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFile:
    """A file that is not in the index, with the short reason."""

    path: Path  # absolute; may hold undecodable bytes as surrogates, as `os.fsdecode` makes them
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """What one `Index.ingest` did. Each file that was found is counted exactly once."""

    indexed: int  # new and changed pictures, also copies of known ones
    unchanged: int  # pictures that the index already held, also those that were moved
    deleted: int  # pictures forgotten because their file is gone; skipped files that are gone are forgotten, too
    gone: int  # of the named folders and files, still in the index: `delete` forgets them, but where a disk may be away
    skipped: tuple[SkippedFile, ...]  # files found but not indexed, also those known from an earlier run
    images_per_second: float  # `indexed` / `seconds`
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """What one `Index.compact` did."""

    segments_before: int
    segments: int
    dropped: int  # items that no longer counted
    bytes_before: int  # of all files that the generation names
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeReport:
    """What one `Index.upgrade` did."""

    embedded: int  # pictures, by this run
    resumed: int  # pictures that an earlier, interrupted run had embedded
    missing: tuple[SkippedFile, ...]  # pictures whose file cannot be read: they cannot stay in another space
    published: bool  # False: pictures are missing, and the index is as it was
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What one `Index.repair` found and did."""

    damage: tuple[str, ...]  # one sentence each
    embedded: int  # pictures of damaged segments that were embedded once more
    lost: tuple[SkippedFile, ...]  # items that could not be brought back
    lost_unnamed: int  # items that could not be brought back, of which not even the name is known
    removed: tuple[str, ...]  # what no generation needs: of killed writers, or mended; paths in the index
    generation: int  # that counts now
    whole: bool  # whether the index is whole now; False: it is as it was


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What is wrong with an index."""

    problems: tuple[str, ...]  # one sentence each; empty when it is sound
    sampled: int = 0  # pictures that were embedded once more and compared
    unusable: int = 0  # pictures of the sample whose file is gone or has changed
    unsampled: str | None = None  # why there is no sample; a problem where a number of pictures was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexInfo:
    """What one generation of an index holds."""

    path: Path
    items: int  # pictures that can be found
    generation: int
    index_type: str
    index_reason: str | None  # why this type; None where nobody chose
    index_parameters: dict[str, int]  # of an approximate index: built with, and searched with
    recall_at_10: float | None  # of an approximate index against exact search, on held-out vectors
    bytes: int  # of all files that the generation names
    embedding_dim: int
    space_id: str
    weights_sha256: str | None
    encoder_name: str
    encoder_source: str | None
    encoder_revision: str | None  # of a hub repository
    encoder_spec: str  # of the gallery
    encoder_resolution: int  # pixels
    skipped: tuple[SkippedFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataField:
    """What the pictures of an index have under one metadata name."""

    pictures: int  # that have it
    values: int  # different texts, numbers and truth values: what `where` can ask for
    common: tuple[tuple[str | int | float | bool, int], ...]  # the most frequent of them, and of how many pictures
    range: tuple[float, float] | None  # the least and the largest number, where there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds that one query took; in a batch, its equal share of the batch."""

    preprocess: float
    encode: float
    search: float  # the vector search and the look-up of the items
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One found picture."""

    rank: int  # from 1
    id: int  # stable over all generations of the index
    path: Path  # absolute
    score: float  # in [-1, 1]: cosine similarity, or votes when a `Blend` was fused by rank
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)  # the user's, and the folder as "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits(Sequence[Hit]):
    """The answer to one query: its hits, best first, and how they were found."""

    hits: tuple[Hit, ...]
    query: str | None  # the path that was searched with, or several; None for bytes and PIL images
    spec: str  # canonical string of the submodel that encoded the query
    runtime: str  # what computed it, for example "torch-cpu"; "index" for items, whose embeddings are stored
    generation: int  # of the index
    latency_ms: Latency

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """One picture of a group of near-duplicates."""

    id: int
    path: Path  # absolute
    score: float  # cosine similarity to the group's first picture, in [-1, 1]
    same_content: bool  # its file's bytes are those of the group's first
    is_link: bool  # its path is a link to another file: it goes with that


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateGroup(Sequence[Duplicate]):
    """Two or more pictures, by id, that are linked: each is as similar as asked to another one of them."""

    pictures: tuple[Duplicate, ...]

    @overload
    def __getitem__(self, index: int) -> Duplicate: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Duplicate, ...]: ...
    def __getitem__(self, index: int | slice) -> Duplicate | tuple[Duplicate, ...]:
        return self.pictures[index]

    def __len__(self) -> int:
        return len(self.pictures)
