"""Where a checkpoint lies, and where one may be written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from matvit.bundled import bundled_folders
from matvit.checkpoint.forms import CONFIG, FILES, read_json
from matvit.checkpoint.swap import refuse_half_swapped
from matvit.errors import CheckpointError, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # not ../folder


class NoSuchCheckpointError(CheckpointError):
    """A name that is no folder, no bundled checkpoint and no hub id."""


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a bundled name, a checkpoint folder or a hub repository id (downloaded if new).

    Raises CheckpointError when there is none.
    """
    text = _text(source)
    if _is_bundled(source):
        return bundled_folders()[text]
    try:
        exists, is_folder = Path(text).exists(), Path(text).is_dir()
    except (OSError, ValueError) as error:  # no file name at all, or in a folder that may not be read
        raise CheckpointError(what=f"cannot be looked up ({error})", where=text[:200], fix="check the path") from error
    if is_folder:
        return Path(text)
    if not exists:
        refuse_half_swapped(Path(text))
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not exists:
        return _download(text, revision)
    kind = CheckpointError if exists else NoSuchCheckpointError
    raise kind(
        what="is a file, not a checkpoint folder" if exists else "no such checkpoint",
        where=text,
        fix=f"give a bundled name ({', '.join(bundled_folders())}), a checkpoint folder, or a hub id (owner/name)",
    )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        raise CheckpointError(
            what=f"is no folder, and cannot be fetched from the hub ({first_line(error)})",
            where=repository,
            fix="check the id, the network and HF_TOKEN, or give a local folder",
        ) from error


def provenance(source: str | Path, folder: Path) -> tuple[str, str | None]:
    """`MatViT.source` and `.revision`: a hub's branch moves on, so the commit that `folder` holds is kept."""
    if _is_bundled(source):
        return os.fspath(source), None
    if Path(source).is_dir():
        return os.fspath(Path(source).resolve()), None
    return os.fspath(source), folder.name  # the hub client keeps each commit in a folder of its name


def _is_bundled(source: str | Path) -> bool:
    return isinstance(source, str) and source in bundled_folders()  # a Path is always a folder


def refuse_to_replace(folder: str | Path) -> Path:
    """The resolved folder, a checkpoint's or one that can be made. CheckpointError for any other.

    Replacing a checkpoint deletes its folder.
    """
    try:
        target = Path(_text(folder)).resolve()
        _refuse_foreign(target)
    except (OSError, ValueError, RuntimeError) as error:  # no folder's name, one that may not be read, links in a loop
        raise CheckpointError(
            what=f"cannot be looked up ({error})", where=os.fspath(folder)[:200], fix="choose another folder"
        ) from error
    return target


def refuse_inside(path: Path) -> None:
    """Raises CheckpointError where `path` lies in a checkpoint's folder, which is replaced only while it is just that.

    Raises OSError where that cannot be looked up.
    """
    for folder in path.resolve().parents:
        if (folder / CONFIG).is_file() and _is_checkpoint(folder):
            raise CheckpointError(
                what=f"lies inside the checkpoint '{folder}', which must hold nothing else",
                where=str(path),
                fix="choose a place outside",
            )


def refuse_unwritable(path: Path) -> None:
    """Raises CheckpointError where nothing can be made at `path`: below a file, or a folder that may not be written.

    Raises OSError where that cannot be looked up.
    """
    above = next(folder for folder in path.resolve().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise CheckpointError(
            what=f"cannot be written: '{above}' is no folder that may be", where=str(path), fix="choose another place"
        )


def _refuse_foreign(target: Path) -> None:
    refuse_inside(target)
    refuse_unwritable(target)
    if not target.exists():
        return
    if target.is_dir():
        found = {entry.name for entry in target.iterdir()}
        foreign = found - {*FILES}
        if not found or (not foreign and _is_checkpoint(target)):
            return
        what = (
            f"holds '{min(foreign)}', which is no part of a checkpoint" if foreign else "is not a checkpoint's folder"
        )
    else:
        what = "is a file"
    raise CheckpointError(what=what, where=str(target), fix="choose a new folder for the checkpoint")


def _is_checkpoint(folder: Path) -> bool:
    """Whether config.json is one of ours, of any version: other tools' model folders have one too."""
    try:
        raw = read_json(folder / CONFIG)
    except CheckpointError:
        return False
    return isinstance(raw, dict) and {"format_version", "space_id"} <= raw.keys()


def _text(source: object) -> str:
    if isinstance(source, str | os.PathLike) and isinstance(text := os.fspath(source), str):
        return text
    raise CheckpointError(
        what=f"a {type(source).__name__} names no checkpoint",
        where="checkpoint",
        fix="give a bundled name, a folder or a hub id as text",
    )
