"""The pictures that the page offers to search with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matvit_app.ui.pictures import shortened, telling_names
from matvit_data import demo_folder

COUNT = 12
_LABEL = 10  # characters that fit under a small picture
_DEMO = (
    ("Umbrella", "caltech-101/umbrella/photo-1.webp"),
    ("Pineapple", "grocery-store/Pineapple/photo-1.webp"),
    ("Juice", "grocery-store/Juice-God-Morgon-Orange-Juice/photo-1.webp"),
    ("Banana", "grocery-store/Banana/photo-1.webp"),
    ("Panda", "caltech-101/panda/photo-1.webp"),
    ("Sunflower", "caltech-101/sunflower/photo-1.webp"),
    ("Starfish", "caltech-101/starfish/photo-1.webp"),
    ("Schooner", "caltech-101/schooner/photo-1.webp"),
    ("Pepper", "grocery-store/Pepper-Red-Bell-Pepper/photo-1.webp"),
    ("Lobster", "caltech-101/lobster/photo-1.webp"),
    ("Laptop", "caltech-101/laptop/photo-1.webp"),
    ("Shoes", "clothing-small/shoes/photo-1.webp"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture of the index to search with."""

    id: int
    path: Path
    name: str

    @property
    def label(self) -> str:
        """The name, or both ends of a long one."""
        return shortened(self.name, most=_LABEL)


def examples(pictures: Mapping[int, Path]) -> list[Example]:
    """The demo's own choice where all of it is among `pictures`, the index's files by id; else an even sample."""
    ids = {path: number for number, path in pictures.items()}
    offered = {demo_folder() / "images" / file: name for name, file in _DEMO}
    if not offered.keys() <= ids.keys():
        chosen = evenly(sorted(ids), COUNT)  # neighbours lie in one folder
        names = zip(chosen, telling_names(chosen), strict=True)
        offered = {path: name.removesuffix(path.suffix) for path, name in names}
    return [Example(id=ids[path], path=path, name=name) for path, name in offered.items()]


def evenly(paths: Sequence[Path], count: int) -> list[Path]:
    """`count` of the paths, or all if they are fewer, in order and at even distances."""
    count = min(count, len(paths))
    return [paths[(2 * number + 1) * len(paths) // (2 * count)] for number in range(count)]
