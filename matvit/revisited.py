"""Revisited Oxford and Paris: query boxes, and which pictures are easy, hard or junk for each query; no torch.

FOLDER/gnd_*.json     the published gnd_*.pkl as JSON (docs/guides/evaluating.md says how): imlist, qimlist, gnd
FOLDER/jpg/NAME.jpg   the pictures

Source: "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", Radenović et al., CVPR 2018.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, overload

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from matvit.datasets import GroundTruth, Pictures
from matvit.errors import DatasetError, ImageError
from matvit.preprocess import open_image
from matvit.regular import read_small

EvaluationProtocol = Literal["easy", "medium", "hard"]
_Position = Annotated[int, Field(ge=0)]
# What counts as right and what as junk, by protocol.
_RIGHT: dict[EvaluationProtocol, tuple[str, ...]] = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}
_JUNK: dict[EvaluationProtocol, tuple[str, ...]] = {
    "easy": ("junk", "hard"),
    "medium": ("junk",),
    "hard": ("junk", "easy"),
}


class _Query(BaseModel):
    model_config = ConfigDict(strict=True)  # true, 0.0 and "0" are no positions

    bbx: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]  # left, top, right, bottom, pixels
    easy: list[_Position]
    hard: list[_Position]
    junk: list[_Position]

    @model_validator(mode="after")
    def _apart(self) -> _Query:
        kinds = [set(self.easy), set(self.hard), set(self.junk)]
        if len(set.union(*kinds)) < sum(map(len, kinds)):
            raise ValueError("a picture is in two of easy, hard and junk")
        return self


class _Truth(BaseModel):
    model_config = ConfigDict(strict=True)

    imlist: list[str]
    qimlist: list[str]
    gnd: list[_Query]

    @model_validator(mode="after")
    def _fits_together(self) -> _Truth:
        for name, pictures in {"imlist": self.imlist, "qimlist": self.qimlist}.items():
            if not pictures:
                raise ValueError(f"{name} names no picture")
        if len(set(self.imlist)) < len(self.imlist):
            raise ValueError("imlist names a picture twice")
        if len(self.gnd) != len(self.qimlist):
            raise ValueError(f"it has {len(self.qimlist)} query pictures, and the truth about {len(self.gnd)}")
        named = (position for query in self.gnd for position in (*query.easy, *query.hard, *query.junk))
        if max(named, default=0) >= len(self.imlist):
            raise ValueError("it names a picture that is not in imlist")
        return self


def find_truth(folder: Path) -> Path | None:
    """The ground truth in a revisited benchmark's folder, or None when it is not one.

    Raises DatasetError when there is only the pickle that the authors publish, or more than one benchmark.
    """
    found = sorted(folder.glob("gnd_*.json"))
    if len(found) > 1:
        raise DatasetError(
            what=f"holds {', '.join(path.name for path in found)}",
            where=str(folder),
            fix="give each benchmark a folder of its own",
        )
    pickles = sorted(folder.glob("gnd_*.pkl"))
    if pickles and not found:
        raise DatasetError(
            what="is a pickle, which can run any code when it is opened",
            where=str(pickles[0]),
            fix=f"convert it to {pickles[0].with_suffix('.json').name} as docs/guides/evaluating.md says",
        )
    return found[0] if found else None


def read_revisited(path: Path, *, protocol: EvaluationProtocol) -> tuple[Pictures, Pictures, GroundTruth]:
    """Queries (cut to their boxes), gallery and ground truth of the file that `find_truth` found.

    Raises DatasetError when it is malformed.
    """
    try:
        content = read_small(path)
        truth = _Truth.model_validate_json(content)
        json.loads(content, object_pairs_hook=_each_once)  # pydantic takes the last of two
    except OSError as error:
        raise DatasetError(
            what=f"cannot be read ({error.strerror})", where=str(path), fix="fetch the whole data set"
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise _no_truth(path, f"{field}: {message}" if field else message) from error
    except ValueError as error:
        raise _no_truth(path, str(error)) from error
    folder = path.parent / "jpg"
    queries = [folder / f"{name}.jpg" for name in truth.qimlist]
    gallery = [folder / f"{name}.jpg" for name in truth.imlist]
    for name, files in {"imlist": gallery, "qimlist": queries}.items():
        if not any(os.path.exists(file) for file in files):  # noqa: PTH110 - Path's raises for names that are too long
            raise DatasetError(
                what=f"holds none of the {len(files)} pictures that {name} names, such as {files[0].name}",
                where=str(folder),
                fix="put the pictures there",
            )
    return (
        Pictures(
            name=f"{path.parent} [{protocol}]",
            images=_Crops(queries, [query.bbx for query in truth.gnd]),
            origins=[str(file) for file in queries],
        ),
        Pictures(name=str(path.parent), images=gallery, origins=[str(file) for file in gallery]),
        GroundTruth(positives=_listed(truth, _RIGHT[protocol]), junk=_listed(truth, _JUNK[protocol])),
    )


def _no_truth(path: Path, why: str) -> DatasetError:
    return DatasetError(
        what=f"is no ground truth ({why})", where=str(path), fix="convert it as docs/guides/evaluating.md says"
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of {', '.join(found)} is given twice")
    return found


def _listed(truth: _Truth, kinds: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted({row for kind in kinds for row in getattr(query, kind)})) for query in truth.gnd)


class _Crops(Sequence[Image.Image]):
    """Boxes of pictures, decoded on access."""

    def __init__(self, files: Sequence[Path], boxes: Sequence[tuple[float, float, float, float]]) -> None:
        self._files = files
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return _Crops(self._files[index], self._boxes[index])
        image = open_image(self._files[index])
        left, top, right, bottom = map(round, self._boxes[index])  # rounded as the authors' code does
        box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ImageError(
                what="the query's box is outside of it",
                where=str(self._files[index]),
                fix="check bbx in the ground truth",
            )
        return image.crop(box)
