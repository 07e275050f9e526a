"""The manifest of one generation, and the CURRENT file that names the one that counts.

docs/formats/index.md describes every field.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from matvit.durable import sync_folder, write_atomic, write_together
from matvit.regular import MOST, read_small
from retrieval.errors import DiskRefusalError, IndexFormatError
from retrieval.files import check_kind, damaged, reading, sha256_bytes
from retrieval.locations import is_url

T = TypeVar("T")
IndexType = Literal["exact", "hnsw", "ivfpq", "sq"]
FileName = Literal["embeddings.f32", "items.sqlite"]  # of a segment

FORMAT_VERSION = 3
ATTEMPTS = 20  # to read a generation before a writer replaces it
CURRENT = "CURRENT"
GENERATIONS = "generations"
SEGMENTS = "segments"
DELETIONS = "deletions"
CACHE = "cache"
STAGING = "upgrade"  # an index of its own, inside the one that it will become
OWN = (GENERATIONS, SEGMENTS, DELETIONS, CACHE, STAGING)  # folders of an index, in which writers remove what they find
LOCK = "writer.lock"
EMBEDDINGS: FileName = "embeddings.f32"
ITEMS: FileName = "items.sqlite"

# Names from a manifest become paths: these patterns leave no room for "..", "/" or anything but our own files.
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SegmentName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
DeletionsName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}\.i64$")]
CacheName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}\.faiss$")]
Count = Annotated[int, Field(ge=0, lt=2**62)]  # far from where SQLite's and numpy's integers end


def _absolute(folder: str) -> str:
    if folder.startswith("file:///"):  # as lists' URLs were kept once
        folder = folder.removeprefix("file://")
    # Either system's: an index may be looked at on another one than it was made on.
    absolute = PurePosixPath(folder).is_absolute() or PureWindowsPath(folder).is_absolute() or is_url(folder)
    if "\0" in folder or not absolute:
        raise ValueError("is no absolute folder")
    return folder


Root = Annotated[str, AfterValidator(_absolute)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Model):
    """One file of a segment."""

    bytes: Count
    sha256: Sha256


class SegmentEntry(_Model):
    """One segment: pictures' embeddings, and the items that they belong to."""

    name: SegmentName
    rows: Count  # embeddings
    items: Count  # rows plus skipped files
    files: Annotated[dict[FileName, FileEntry], Field(min_length=2)]  # both


class DeletionsEntry(_Model):
    """The items of one segment that no longer count."""

    file: DeletionsName
    bytes: Count
    sha256: Sha256
    count: Count


class EncoderEntry(_Model):
    """What embedded the gallery."""

    name: str
    source: str | None
    revision: str | None = None
    space_id: str
    weights_sha256: str | None
    spec: str
    resolution: Annotated[int, Field(gt=0)]  # pixels
    embedding_dim: Annotated[int, Field(gt=0, le=2**20)]


_MOST_EFFORT = 10**6  # hundreds of times what building chooses: faiss ends the process for far more


class ApproximateEntry(_Model):
    """The approximate index over some of the segments: a cache, which can be built anew from their embeddings."""

    file: CacheName
    bytes: Count
    sha256: Sha256
    segments: dict[SegmentName, Count]  # their rows are in it in this order, deleted ones too
    parameters: dict[str, int]  # it was made with; by kind
    effort: Annotated[int, Field(gt=0, le=_MOST_EFFORT)]  # HNSW's efSearch, IVF's nprobe
    depth: Annotated[int, Field(gt=0, le=_MOST_EFFORT)]  # candidates that exact scores decide on, for ten hits
    recall_at_10: Annotated[float, Field(ge=0, le=1)]  # against exact search, on held-out vectors
    held_out: Annotated[int, Field(gt=0)]  # so many of the rows, evenly spread; the last in it

    @property
    def rows(self) -> int:
        """R, vectors in the index."""
        return sum(self.segments.values())

    @model_validator(mode="after")
    def _check_held_out(self) -> ApproximateEntry:
        if self.held_out > max(1, self.rows // 10):  # no version has held out more
            raise ValueError("holds out more than a tenth of its rows")
        return self


class AskedEntry(_Model):
    """How the index was asked to be searched: its type is chosen again when it grows or shrinks."""

    type: Literal["auto", "exact", "hnsw", "ivfpq", "sq"]
    max_ram: Count | None = None  # bytes that the searched vectors may take, for "auto"
    chosen: IndexType  # the last time; the index stays exact where that type's recall is too low


class Manifest(_Model):
    """One immutable published state of an index."""

    format_version: Literal[3] = 3
    generation: Annotated[int, Field(gt=0)]
    parent: int | None
    created: datetime  # UTC
    encoder: EncoderEntry
    index_type: IndexType = "exact"
    index_reason: str | None = None  # why this type, when it was chosen or asked for
    index_asked: AskedEntry | None = None  # None: nothing was
    approximate: ApproximateEntry | None = None  # None: every vector is compared
    roots: dict[str, Root]  # name -> absolute folder
    segments: tuple[SegmentEntry, ...]
    deletions: dict[SegmentName, DeletionsEntry]
    next_id: Count  # ids below were given away

    @model_validator(mode="after")
    def _check_segments(self) -> Manifest:
        names = {entry.name for entry in self.segments}
        if len(names) < len(self.segments) or not names.issuperset(self.deletions):
            raise ValueError("names a segment twice, or deletions of none")
        if (self.index_type == "exact") != (self.approximate is None):
            raise ValueError("does not describe the index of its type")
        return self

    @property
    def asked(self) -> AskedEntry:
        """How it is to be searched; where nothing was asked, as it is."""
        return self.index_asked or AskedEntry(type=self.index_type, chosen=self.index_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """What CURRENT says: the generation's file and its sha256."""

    name: str
    sha256: str


def is_index(folder: Path) -> bool:
    """Whether `folder` looks like an index, damaged or not, also one that lost its CURRENT.

    What a killed creation leaves is none, nor is a folder that may not be looked into.
    """
    # os.path, since Path.is_file raises where a folder may not be entered.
    if os.path.isfile(folder / CURRENT):  # noqa: PTH113
        return os.path.exists(folder / GENERATIONS) or os.path.isdir(folder / SEGMENTS)  # noqa: PTH110, PTH112
    if not os.path.isdir(folder / GENERATIONS):  # noqa: PTH112
        return False
    try:
        manifests = {path.name for path in (folder / GENERATIONS).glob("[0-9]*.json")}
        return bool(manifests - {first := manifest_name(1), copy_of(first)}) or any(
            (folder / SEGMENTS).glob(f"*/{ITEMS}")
        )
    except OSError:
        return False


def read_pointer(folder: Path) -> Pointer:
    """Read CURRENT. Raises IndexFormatError when `folder` is no index or CURRENT is damaged."""
    if not is_index(folder):
        raise _no_index(folder)
    check_kinds(folder)
    path = folder / CURRENT
    with reading(path):
        line = read_small(path)
    match = re.fullmatch(rb"([0-9]{6,}\.json) ([0-9a-f]{64})\n", line)
    if match is None:
        raise damaged(path, "does not name a generation and its sha256")
    return Pointer(name=match[1].decode("ascii"), sha256=match[2].decode("ascii"))


def check_kinds(folder: Path) -> None:
    """Raises DamagedFileError where a file stands in the place of a folder of the index, or the reverse."""
    for name in OWN:
        check_kind(folder / name, folder=True)
    check_kind(folder / CURRENT, folder=False)


def _no_index(folder: Path) -> IndexFormatError:
    fix = "make one with: matvit index PICTURES --index FOLDER"
    try:
        (folder / CURRENT).stat()
    except NotADirectoryError:
        what = "is a file, not an index"
    except FileNotFoundError:
        what = "holds no index" if folder.is_dir() else "no such index"
    except OSError as error:
        what, fix = f"cannot be read ({error.strerror})", "check the disk and the folder's permissions"
    else:
        what = "holds no index"
    return IndexFormatError(what=what, where=str(folder), fix=fix)


def read_current(folder: Path, read: Callable[[Pointer], T]) -> T:
    """`read` what CURRENT names; anew when a writer moved on meanwhile, since it removes what it replaced.

    Raises IndexFormatError when that happens ATTEMPTS times, and what `read` raises when nothing moved.
    """
    for _ in range(ATTEMPTS):
        pointer = read_pointer(folder)
        try:
            return read(pointer)
        except IndexFormatError:
            if read_pointer(folder) == pointer:
                raise
    raise restless(folder)


def restless(folder: Path) -> IndexFormatError:
    """The error for an index whose generation is replaced each time before it is read."""
    return IndexFormatError(
        what=f"a writer replaced what was being read {ATTEMPTS} times in a row",
        where=str(folder),
        fix="run the same again when it is done",
    )


def read_manifest(folder: Path, pointer: Pointer) -> Manifest:
    """Read and check the generation that `pointer` names. Raises IndexFormatError."""
    path = folder / GENERATIONS / pointer.name
    with reading(path):
        data = read_small(path)
    if sha256_bytes(data) != pointer.sha256:
        raise damaged(path, "is not what was published (its sha256 differs from the one in CURRENT)")
    return parse_manifest(data, path=path)


def parse_manifest(data: bytes, *, path: Path) -> Manifest:
    """A manifest's content, checked for its form, brought up to date. Raises IndexFormatError."""
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict):
            raise damaged(path, "is no JSON object")
        # Through JSON again, so that strict types still read dates.
        manifest = Manifest.model_validate_json(json.dumps(upgrade(raw, path=path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "segments"
        raise damaged(path, f"has a bad field '{field}' ({first['msg']})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "is no JSON") from error
    if path.name not in (name := manifest_name(manifest.generation), copy_of(name)):
        raise damaged(path, f"holds generation {manifest.generation}")
    return manifest


def manifest_name(generation: int) -> str:
    """The manifest's file below `generations/`."""
    return f"{generation:06d}.json"


def copy_of(name: str) -> str:
    """The name of a manifest's copy beside it: `matvit repair` takes it where the manifest is damaged."""
    return f"{name.removesuffix('.json')}.copy.json"


def generation_of(path: Path) -> int | None:
    """The generation that a manifest's name, or its copy's, tells; None: it is neither's."""
    match = re.fullmatch(r"([0-9]{6,18})(\.copy)?\.json", path.name)
    return None if match is None else int(match[1])


def make_folders(folder: Path) -> None:
    """Make `folder` and those in it, where they are missing, and wait until the disk has their names.

    CURRENT must not be there before them, and a copy or a loss of power may have left out those that are empty.
    """
    homes = [folder / name for name in (GENERATIONS, SEGMENTS, DELETIONS)]
    missing = {place for home in homes for place in (home, *home.parents) if not place.is_dir()}
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    for parent in sorted({place.parent for place in missing}):
        sync_folder(parent)


def publish_manifest(folder: Path, manifest: Manifest) -> Pointer:
    """Write the generation, twice, then CURRENT. Until the very last step readers see the generation before.

    Raises FileExistsError rather than replace a manifest, which CURRENT may name, and DiskRefusalError for one that is
    too large to be read.
    """
    name = manifest_name(manifest.generation)
    if (folder / GENERATIONS / name).exists():
        raise FileExistsError(errno.EEXIST, f"generation {name} is there already")
    data = (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode("ascii")
    if len(data) > MOST:
        raise DiskRefusalError(
            what=f"the index cannot be written (it would name {len(manifest.roots):,} folders of pictures)",
            where=str(folder),
            fix="index the folders around them instead, or fewer of them",
        )
    pointer = Pointer(name=name, sha256=sha256_bytes(data))
    write_together({folder / GENERATIONS / one: data for one in (copy_of(name), name)})
    write_atomic(folder / CURRENT, f"{pointer.name} {pointer.sha256}\n".encode("ascii"))
    return pointer


def remove_unpublished(folder: Path, *, newest: int) -> None:
    """Remove the manifests after `newest`: CURRENT never named them. Only while holding the writer's lock."""
    for path in list((folder / GENERATIONS).glob("*.json")):  # none where there is no such folder
        if (generation_of(path) or 0) > newest:
            path.unlink()


Json = dict[str, Any]


def _v2_counts_held_out_rows(raw: Json) -> Json:
    """Before, an approximate index held out 200 rows, or a tenth where that is fewer."""
    upgraded, approximate = {**raw, "format_version": 2}, raw.get("approximate")
    if approximate is not None:
        held_out = max(1, min(200, sum(approximate["segments"].values()) // 10))
        upgraded["approximate"] = {"held_out": held_out, **approximate}
    return upgraded


def _v3_checks_each_item(raw: Json) -> Json:
    """Before, items had no checksums; tables of both kinds are read."""
    return {**raw, "format_version": 3}


# From this version to the next, each a pure function, which may take it for granted that the manifest has its form.
UPGRADES: dict[int, Callable[[Json], Json]] = {1: _v2_counts_held_out_rows, 2: _v3_checks_each_item}


def upgrade(raw: Json, *, path: Path) -> Json:
    """Bring an older manifest to FORMAT_VERSION. Raises IndexFormatError for a newer or unknown one."""
    while (found := raw.get("format_version")) != FORMAT_VERSION or type(found) is not int:  # true is no version
        if type(found) is not int or found not in UPGRADES:
            _refuse_format(found, path)
        try:
            raw = UPGRADES[found](raw)
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(path, f"does not have the form of format version {found}") from error
    return raw


def _refuse_format(found: object, path: Path) -> NoReturn:
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise IndexFormatError(
            what=f"the index has format version {found}, newer than the {FORMAT_VERSION} that this program reads",
            where=str(path),
            fix="upgrade: pip install -U matvit-retrieval",
        )
    raise damaged(path, f"has format version {found}, which is unknown")
