"""Which files are meant: folders, files, patterns, lists, shards, URLs -> `FoundFiles`."""

# Strings, because a Path per file would double the time of walking a large collection.
# ruff: noqa: PTH100, PTH112, PTH118, PTH119, PTH120, PTH207

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress

from matvit.errors import MissingExtraError
from retrieval.errors import IngestError
from retrieval.files import keeping_lists
from retrieval.found_files import TABLE, TAR, FoundFiles, is_picture
from retrieval.lists import Listed, is_list, read_list, read_table
from retrieval.locations import (
    Status,
    filesystem,
    is_top,
    is_url,
    location,
    no_such_name,
    os_reason,
    remote_errors,
    remote_status,
    split_member,
)
from retrieval.shards import ShardError, Table, holds_members, is_table, is_tar

PathLike = str | os.PathLike[str]
Images = PathLike | Iterable[PathLike]
_NO_FOLDER = "lies in no folder of its store; put it into one"
_ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_ARCHIVE = "a compressed archive; unpack it, for example to a plain .tar"


def find_files(images: Images | FoundFiles, *, delete: bool = False) -> FoundFiles:
    """The files that `images` means: a folder, a file, a pattern, a list, a shard, a URL, or several of those.

    Folders are walked with all their sub-folders, links to folders included, each folder once, for files
    that are named like pictures (`matvit.datasets.PICTURE_SUFFIXES`); hidden files and folders and other
    indexes are left out. Named files are taken whatever their name, except lists (.txt, .csv, .parquet with a
    path column), whose pictures are meant, and shards (.tar, .parquet with a column of pictures). A missing
    one among several is listed. Raises IngestError when there is nothing at all, or for a list that is none;
    MissingExtraError for a URL without fsspec, or Parquet without pyarrow.
    `delete`: whether what is gone is to be forgotten; the error then says how, since all of it may only be away.
    """
    if isinstance(images, FoundFiles):
        return images
    named = [_text(image) for image in ([images] if isinstance(images, str | os.PathLike) else _several(images))]
    with keeping_lists():
        found = _find(named)
        if not len(found):
            raise _nothing(named, found, delete=delete)
    return found


def _several(images: object) -> Iterable[object]:
    if isinstance(images, bytes) or not isinstance(images, Iterable):  # bytes are many numbers
        raise _no_path(images)
    return images


def _text(image: object) -> str:
    if isinstance(image, str | os.PathLike) and isinstance(text := os.fspath(image), str):
        if not text:  # it would be the whole working directory
            raise IngestError(
                what="an empty name", where="images", fix="name pictures, or '.' for the working directory"
            )
        return text
    raise _no_path(image)


def _no_path(value: object) -> IngestError:
    return IngestError(
        what=f"a {type(value).__name__} names no pictures",
        where="images",
        fix="give a path, a pattern or a URL as text, or several of them",
    )


def _find(named: list[str]) -> FoundFiles:
    found = FoundFiles()
    for name in named:
        name = location(name)  # noqa: PLW2901 - a URL that went through Path
        try:
            (_add_url if is_url(name) else _add)(found, name)
        except IngestError as error:
            if len(named) == 1 or not is_url(name):  # a list that is none is a mistake
                raise
            found.skip(name, os_reason(error))  # as a line of a list
    return found


def _add(found: FoundFiles, name: str) -> None:
    path = os.path.abspath(name)
    error = lstat_error(path)
    if error is None:
        _add_existing(found, path)
    elif glob.has_magic(name):
        base = os.path.abspath(os.path.dirname(re.split(r"[*?\[]", name, maxsplit=1)[0]))
        found.note_folder(base)
        for match in _matches(found, name, base=base):
            _add_existing(found, match, matched=True)
    else:
        found.skip(path, os_reason(error), gone=is_gone(error))


def _add_url(found: FoundFiles, url: str) -> None:
    """The files of a store below a URL, or those that a pattern matches."""
    _forget_listings(found, url)
    system, path = filesystem(url)
    head = url.rstrip("/").removesuffix(path.rstrip("/"))
    # Of what names a host, such as ftp://host/photos, `unstrip_protocol` leaves the host out.
    named: Callable[[str], str] = system.unstrip_protocol if head == url.rstrip("/") else head.__add__
    try:
        with remote_errors():
            by_name = True
            if glob.has_magic(path) and not system.exists(path):
                infos = system.glob(path, detail=True)
                found.note_folder(named(re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]))
            elif system.isdir(path):
                by_name = False
                infos = system.find(path, detail=True)
                found.note_folder(named(path).rstrip("/"))
            else:
                infos = {path: system.info(path)}
    except OSError as error:
        found.skip(url, os_reason(error), gone=is_gone(error))
        return
    for place, info in sorted(infos.items()):
        one, status = named(place), remote_status(info)
        if status.regular and (by_name or is_picture(one)):
            _add_file(found, one, status=status)


def _forget_listings(found: FoundFiles, url: str) -> None:
    """Once a run: fsspec keeps what a store has listed as long as the process lives."""
    store = "/".join(url.split("/", 3)[:3])
    if store not in found.stores:
        found.stores.add(store)
        with suppress(IngestError, MissingExtraError):  # told where it is read
            filesystem(url)[0].invalidate_cache()


def _add_existing(found: FoundFiles, path: str, *, matched: bool = False) -> None:
    if os.path.isdir(path):
        found.note_folder(path, matched=matched)
        found.add_folder(path)
    else:
        _add_file(found, path)


def _add_file(found: FoundFiles, path: str, *, status: Status | None = None) -> None:
    """A file that was named: a picture, a list or a shard."""
    if is_list(path):
        for line in read_list(path):
            _add_listed(found, line, source=path)
        return
    if _has_no_folder(path) or path.lower().endswith(_ARCHIVES):
        found.skip(path, _NO_FOLDER if _has_no_folder(path) else _ARCHIVE)
        return
    found.note_base(os.path.dirname(path))
    if is_table(path):
        _add_table(found, path, status)
    elif is_tar(path):
        found.add_file(path, kind=TAR, status=status)
    else:
        found.add_file(path, status=status)


def _add_table(found: FoundFiles, path: str, status: Status | None) -> None:
    try:
        table = Table(path)
    except OSError as error:
        found.skip(path, error.reason if isinstance(error, ShardError) else os_reason(error))
        return
    try:
        if table.image_column is None:
            for line in read_table(table):
                _add_listed(found, line, source=path)
        else:
            found.add_file(path, kind=TABLE, status=status)
    except ShardError as error:
        found.skip(path, error.reason)
    finally:
        table.close()


def _add_listed(found: FoundFiles, line: Listed, *, source: str) -> None:
    if _has_no_folder(line.path):
        found.skip(line.path, _NO_FOLDER)
        return
    if is_url(line.path):
        _forget_listings(found, line.path)
    elif (error := lstat_error(line.path)) is not None:
        reason = f"{os_reason(error)} (line {line.line} of {os.path.basename(source)})"
        found.skip(line.path, reason, gone=is_gone(error))
        return
    folder = os.path.dirname(source)
    container, _ = split_member(line.path)
    found.note_base(folder if is_below(line.path, [folder]) else os.path.dirname(container))
    found.add_file(line.path, metadata=line.metadata, problem=line.problem)


def _matches(found: FoundFiles, pattern: str, *, base: str) -> list[str]:
    """Absolute paths; those through links below `base` last, so that a file is known by its own name."""
    real_base = os.path.realpath(base)

    def order(path: str) -> tuple[bool, str]:
        return os.path.realpath(path) != os.path.normpath(os.path.join(real_base, os.path.relpath(path, base))), path

    return sorted(map(os.path.abspath, _glob(found, pattern)), key=order)


def _glob(found: FoundFiles, pattern: str) -> list[str]:
    """What the pattern matches; `**` is any folders, each once: glob's own would follow links in circles."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    head, rest = "/".join(parts[:place]), "/".join(parts[place + 1 :])
    bases = glob.glob(head or ("/" if place else "."))
    folders = [folder for base in bases if os.path.isdir(base) for folder in found.folders_below(base)]
    if not rest:
        return folders
    return [match for folder in folders for match in _glob(found, os.path.join(glob.escape(folder), rest))]


def lstat_error(path: str) -> OSError | None:
    """Why nothing can be said to be at `path`; None when something is."""
    try:
        os.lstat(path)
    except OSError as error:
        return error
    except ValueError:  # NUL, or half of a surrogate pair
        return no_such_name()
    return None


def is_gone(error: OSError | None) -> bool:
    """Whether it says that the file is not there; a folder or a disk that refuses says nothing about its files."""
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _nothing(named: list[str], found: FoundFiles, *, delete: bool) -> IngestError:
    if found.skipped:
        what, _, fix = found.skipped[0].reason.partition("; ")  # which some have
        fix = fix or "check the file, the disk and the permissions"
        return IngestError(what=what, where=location(found.skipped[0].path), fix=fix)
    fix = "name a folder, a file or a pattern that holds pictures"
    if delete:  # an empty folder may be where a disk is not mounted
        fix += (
            "; nothing was forgotten, since a disk may be away: if it is not, matvit delete PATH --index INDEX does it"
        )
    if not named:
        return IngestError(what="no pictures were given", where="images", fix=fix)
    first = location(named[0])
    if is_list(first) or is_table(first):
        gone = f" ({location(found.missing[0].path)}: {found.missing[0].reason})" if found.missing else ""
        return IngestError(what=f"the list names no picture that is there{gone}", where=first, fix=fix)
    if os.path.isdir(first):
        return IngestError(what="holds no pictures", where=f"folder {first}", fix=fix)
    if glob.has_magic(first):
        return IngestError(what="the pattern matches no files", where=first, fix=fix)
    return IngestError(what="no such file or folder", where=first, fix=fix)


def _has_no_folder(path: str) -> bool:
    """Whether a URL names something at the top of its store, such as "memory://a.png": roots are folders."""
    return is_url(path) and is_top(path)


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether the absolute `path` lies below one of these absolute folders, or in one of these shards."""
    return any(
        path.startswith(os.path.join(folder, "")) or (holds_members(folder) and path.startswith(f"{folder}#"))
        for folder in folders
    )
