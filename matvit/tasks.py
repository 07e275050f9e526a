"""What `matvit eval` is given: queries, a gallery, and which pictures of it are right; no torch."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from matvit import layouts
from matvit.datasets import GroundTruth, Pictures, data_folder, read_dataset
from matvit.errors import DatasetError
from matvit.revisited import EvaluationProtocol, find_truth, read_revisited


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """Pictures that search, and what they search."""

    queries: Pictures  # labelled, unless there is a truth
    gallery: Pictures | None  # None: the queries themselves, without the one that searches
    truth: GroundTruth | None = None  # None: right is what has the query's class


def read_task(
    location: str, *, gallery: str | None = None, classes: str | None = None, protocol: EvaluationProtocol | None = None
) -> RetrievalTask:
    """The task at `location`, a data set or a benchmark's folder; `classes` as `read_dataset` takes them.

    The In-shop benchmark and revisited Oxford and Paris bring their own gallery; `protocol` (None: medium) is
    for the latter two. What is not there is looked up below the data folder, as in a recipe.
    Raises DatasetError for data that are not there, and for options that do not fit them.
    """
    location = _place(location)
    folder = Path(location)
    path = find_truth(folder) if folder.is_dir() else None
    if path is not None:
        if gallery is not None or classes is not None:
            raise _unfit(location, "brings its own gallery, and has no classes", "leave --gallery and --classes out")
        queries, pictures, truth = read_revisited(path, protocol=protocol or "medium")
        return RetrievalTask(queries=queries, gallery=pictures, truth=truth)
    if protocol is not None:
        raise _unfit(location, "is not revisited Oxford or Paris, which alone have protocols", "leave --protocol out")
    if gallery is None and layouts.is_in_shop(folder):
        location, gallery = str(folder / "query"), str(folder / "gallery")
    return RetrievalTask(
        queries=read_dataset(location, classes=classes),
        gallery=None if gallery is None else read_dataset(_place(gallery), classes=classes),
    )


def _place(location: str) -> str:
    """`location` as given, or below the data folder where only that is there."""
    try:
        below = str(data_folder() / location)
    except DatasetError:
        return location
    return below if _is_there(below) and not _is_there(location) else location


def _is_there(location: str) -> bool:
    """Whether a folder, a file, a pattern's shards or a split's are there."""
    return os.path.exists(location) or any(glob.glob(pattern) for pattern in (location, f"{location}[-_.]*"))  # noqa: PTH110, PTH207


def _unfit(where: str, what: str, fix: str) -> DatasetError:
    return DatasetError(what=what, where=where, fix=fix)
