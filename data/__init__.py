"""The demo photographs, and the scripts that draw them and the start weights from their origins."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from matvit.errors import DatasetError

__all__ = ["DemoPhoto", "demo_folder", "demo_photos"]

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPhoto:
    """One demo photograph, with what must be said of it wherever it is shown."""

    path: str  # below `demo_folder()`, with "/": images/<set>/<class>/<name>.webp
    data_set: Annotated[str, Field(alias="set")]
    class_name: Annotated[str, Field(alias="class")]  # also the name of its folder
    caption: str  # one sentence
    licence: str  # SPDX identifier
    credit: str  # authors and title of the data set
    counted: bool  # False: training saw this class, so it is shown but left out of the demo's recall
    role: Literal["photo", "iconic"]  # iconic: the one clean product picture of its class
    sha256: str  # of the file, hex

    @property
    def file(self) -> Path:
        """The picture's absolute path."""
        return demo_folder() / self.path


class DemoFile(BaseModel, frozen=True, extra="forbid"):
    """The content of `demo.json`."""

    format_version: Literal[1]
    photos: tuple[DemoPhoto, ...]


def demo_folder() -> Path:
    """The installed folder of the demo photographs; its `images` folder can be indexed as it is."""
    return Path(str(files("matvit_data"))) / "demo"


def demo_photos() -> tuple[DemoPhoto, ...]:
    """All demo photographs, sorted by path. Raises DatasetError when their list is missing or damaged."""
    source = demo_folder() / "demo.json"
    try:
        return DemoFile.model_validate_json(source.read_bytes()).photos
    except (OSError, ValidationError) as error:
        raise DatasetError(
            what="the list of demo photographs is missing or damaged",
            where=str(source),
            fix="install the package again",
        ) from error
