"""A checkpoint's folder takes an earlier one's place, in one step where the system can do that.

Elsewhere a kill between two renames leaves the earlier one whole under a dotted name beside the folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from matvit.durable import sync_folder, write_synced
from matvit.errors import CheckpointError

_Kind = Literal["new", "old"]
_ABANDONED_SECONDS = 3600.0  # no save writes a file for longer


def replace_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make `target` a folder of just these files, its parents too. Raises OSError; `target` is then as it was."""
    unfinished = _beside(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        for name, content in files.items():
            write_synced(unfinished / name, content)
        sync_folder(unfinished)
        _swap(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_half_swapped(target: Path) -> None:
    """Raises CheckpointError where a save was killed between its renames: the one before lies beside `target`."""
    if old := next(iter(_leftovers(target, "old")), None):
        raise CheckpointError(
            what="is missing: a save was killed, and the checkpoint before it is beside it under another name",
            where=str(target),
            fix=f"move it back: {shlex.join(['mv', str(old), str(target)])}",
        )


def _swap(new: Path, target: Path) -> None:
    """Put `new` in `target`'s place; what was there is then at `new`, or under another dotted name."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = _beside(target, "old")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(working_folder, os.fsencode(one), working_folder, os.fsencode(other), exchange)
    return done == 0


def _beside(target: Path, kind: _Kind) -> Path:
    return target.with_name(f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}")


def remove_leftovers(target: Path) -> None:
    """What this save and killed earlier ones left beside `target`, now that it is whole.

    What another process writes there is young.
    """
    for path in [*filter(_is_abandoned, _leftovers(target, "new")), *_leftovers(target, "old")]:
        shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(unfinished: Path) -> bool:
    try:
        return time.time() - unfinished.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:  # just finished
        return False


def _leftovers(target: Path, kind: _Kind) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]{{8}}")
    return [path for path in target.parent.glob(".*") if name.fullmatch(path.name)]
