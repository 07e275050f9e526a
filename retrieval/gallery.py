"""One generation of an index in memory, ready to be searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from matvit.metrics import IntArray
from matvit.preprocess import FloatArray
from retrieval.arguments import is_whole
from retrieval.backends.cache import open_search
from retrieval.errors import DamagedFileError, SearchError
from retrieval.exact import Found, Vectors, exact_search
from retrieval.files import RESTORE
from retrieval.filters import Column, Scalar, Where, parse_where
from retrieval.items import Place
from retrieval.manifest import read_current
from retrieval.metadata import from_json
from retrieval.snapshot import Snapshot
from retrieval.types import Hit

_NAMED = 20  # metadata names, for one that no picture has


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """N pictures that can be found: where they are, what is known of them, and their vectors."""

    snapshot: Snapshot
    device: str = "cpu"  # where every vector is compared; see `open_search`
    ids: IntArray  # (N,) int64, live pictures of all segments in order
    places: Sequence[Place]  # (N,) where their files are
    digests: Sequence[bytes]  # (N,) sha256 of their files' content
    vectors: Vectors
    _metadata: Sequence[str] = field(repr=False)  # (N,) JSON objects as text: parsed, a million would fill the memory
    _columns: dict[str, Column] = field(default_factory=dict, repr=False)  # those that were asked for

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu", reuse: Snapshot | None = None) -> Gallery:
        """The generation that counts, searched on `device`. Raises IndexFormatError, or SearchError for the device."""
        return read_current(folder, lambda _: cls._read(Snapshot.open(folder, reuse=reuse), device))

    @classmethod
    def _read(cls, snapshot: Snapshot, device: str) -> Gallery:
        """A writer may remove the files afterwards: what searching needs is in memory, or mapped."""
        live = [(segment, segment.live_rows()) for segment in snapshot.segments]
        none = np.empty(0, dtype=np.int64)
        ids = np.concatenate([none, *(segment.row_ids[rows] for segment, rows in live)])
        places: list[Place] = []
        metadata: list[str] = []
        digests: list[bytes] = []
        once: dict[str, str] = {}  # most pictures' metadata equal another one's: sys.intern would keep them for ever
        for segment, rows in live:
            every = segment.items.pictures()
            for row in rows.tolist():
                picture = every[row]
                places.append(picture.place)
                metadata.append(once.setdefault(picture.metadata, picture.metadata))
                digests.append(_digest(picture.content_sha256, segment.items.path))
        return cls(
            snapshot=snapshot,
            device=device,
            ids=ids,
            places=places,
            digests=digests,
            vectors=open_search(snapshot, ids, device=device),
            _metadata=metadata,
        )

    @cached_property
    def positions(self) -> Mapping[int, int]:
        """Position by id."""
        return {number: position for position, number in enumerate(self.ids.tolist())}

    def position_of(self, number: int) -> int:
        """The position of the picture with this id. Raises SearchError when there is none."""
        if not is_whole(number) or number not in self.positions:
            raise SearchError(
                what=f"holds no picture with id {number!r}",
                where=str(self.snapshot.folder),
                fix="take one that a search shows; in Python, Retriever.paths() has all",
            )
        return self.positions[number]

    @cached_property
    def _by_file(self) -> Mapping[str, int]:
        return {self.snapshot.file_name(place): position for position, place in enumerate(self.places)}

    @cached_property
    def by_digest(self) -> Mapping[bytes, Sequence[int]]:
        """Positions of the pictures whose files have the same content, ascending."""
        found: dict[bytes, list[int]] = {}
        for position, digest in enumerate(self.digests):
            found.setdefault(digest, []).append(position)
        return found

    def same_picture(self, *, file: str | None, digest: bytes | None) -> set[int]:
        """Positions of the pictures that lie at the absolute path `file`, or have the content `digest`."""
        found = set() if digest is None else set(self.by_digest.get(digest, ()))
        if file is not None and file in self._by_file:
            found.add(self._by_file[file])
        return found

    def path(self, position: int) -> Path:
        """The absolute path of one picture."""
        return self.snapshot.full_path(self.places[position])

    def metadata(self, position: int) -> dict[str, Any]:
        """What is known of one picture."""
        return from_json(self._metadata[position], self.places[position][1])

    def allowed(self, where: Where | None) -> IntArray | None:
        """Ascending positions of the pictures that `where` allows; None: all of them.

        Raises SearchError for a condition that is none, or a name that no picture has.
        """
        if where is None:
            return None
        allowed = np.arange(len(self.ids), dtype=np.int64)
        for name, condition in parse_where(where).items():
            if len(self.ids):
                allowed = np.intersect1d(allowed, condition.select(self._column(name), name=name), assume_unique=True)
        return allowed

    def nearest(
        self,
        queries: FloatArray,
        *,
        k: int | None,
        min_score: float | None,
        within: IntArray | None,
        without: Sequence[set[int]],
    ) -> list[Found]:
        """For each of `queries` (Q, D): the `k` best (None: all) of the rows `within`, but none of its `without`."""
        spare = None if k is None else k + max(map(len, without), default=0)
        if within is None and spare is not None:
            answers = self.vectors.search(queries, k=spare)
        else:
            answers = exact_search(self.vectors, queries, ids=self.ids, within=within, k=spare, min_score=min_score)
        return [
            _trimmed(found, k=k, min_score=min_score, without=own) for found, own in zip(answers, without, strict=True)
        ]

    def hits(self, found: Found) -> tuple[Hit, ...]:
        """Join what was found with its files."""
        positions, scores = found
        return tuple(
            Hit(
                rank=rank,
                id=int(self.ids[position]),
                path=self.path(position),
                score=min(1.0, max(-1.0, score)),  # unit length is exact to rounding only
                metadata=self.metadata(position),
            )
            for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist(), strict=True), start=1)
        )

    def values(self, name: str) -> list[Scalar]:
        """What pictures have under a metadata name, the most frequent first. Raises SearchError if none has it."""
        if not isinstance(name, str):
            raise SearchError(what=f"{name!r} is no metadata name", where="values", fix="give a text, such as 'label'")
        positions = self._column(name).positions if len(self.ids) else {}
        return [value for _, value in sorted(positions, key=lambda key: -len(positions[key]))]

    def _column(self, name: str) -> Column:
        if name not in self._columns:  # two threads may both read it, and find the same
            column = Column.of([self.metadata(position).get(name) for position in range(len(self.ids))])
            if not column.positions:
                found: dict[str, bool] = {}
                for position in range(len(self.ids)):
                    for key, value in self.metadata(position).items():
                        found[key] = found.get(key, False) or isinstance(value, Scalar)
                if name in found and not found[name]:
                    raise SearchError(
                        what=f"'{name}' holds lists or objects, which cannot be asked for",
                        where="where",
                        fix="index the pictures with a text, a number or a truth value under it",
                    )
                known = sorted(key for key, can_be_asked in found.items() if can_be_asked)
                known = list(dict.fromkeys([*get_close_matches(str(name), known), *known]))  # the nearest first
                named = ", ".join(known[:_NAMED]) + (f" and {len(known) - _NAMED} more" if len(known) > _NAMED else "")
                raise SearchError(
                    what=f"no picture has '{name}'",
                    where="where",
                    fix=f"use one of: {named}" if known else "index the pictures with metadata",
                )
            self._columns[name] = column
        return self._columns[name]


def _digest(text: str, path: Path) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise DamagedFileError(what="an item's content has no sha256", where=str(path), fix=RESTORE) from error


def _trimmed(found: Found, *, k: int | None, min_score: float | None, without: set[int]) -> Found:
    positions, scores = found
    if without:
        others = ~np.isin(positions, list(without))
        positions, scores = positions[others], scores[others]
    if min_score is not None:
        positions, scores = positions[scores >= min_score], scores[scores >= min_score]
    return positions[:k], scores[:k]
