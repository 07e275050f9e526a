"""What `matvit eval` is given: queries, a gallery, and which pictures of it are right; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matvit import layouts
from matvit.datasets import GroundTruth, Pictures, find_dataset, read_dataset
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
    location = find_dataset(location)
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
        gallery=None if gallery is None else read_dataset(find_dataset(gallery), classes=classes),
    )


def _unfit(where: str, what: str, fix: str) -> DatasetError:
    return DatasetError(what=what, where=where, fix=fix)
