"""Draw the demo photographs from their data sets: the same pictures from the same data, every time.

    python -m matvit_data.draw_demo --data DATA --out data/demo

DATA holds the data sets as parquet files (grocery-store/test-*.parquet, ...) or as their publishers
offer them, unpacked: GroceryStoreDataset/ (its git repository), 101_ObjectCategories/ (Caltech-101,
which has no test split: drawn from all its pictures) and clothing-dataset-small/ (its git repository).
Writes OUT/images/<set>/<class>/<name>.webp and OUT/demo.json; `data/demo/LICENCES.md` is written by hand.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from matvit.datasets import LabelledImages, data_folder, read_dataset
from matvit.errors import DatasetError, MatVitError
from matvit.preprocess import ImageSource, open_image
from matvit_data import FORMAT_VERSION

SHORT_SIDE = 160  # pixels
QUALITY = 80  # of WebP, for pictures that are not small WebP files already


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which pictures of one split are drawn, and what is said of them."""

    data_set: str
    places: tuple[str, str]  # parquet split, folder of the public original
    per_class: int
    caption: Callable[[str], str]
    licence: str
    credit: str
    skip: frozenset[str] = frozenset()  # folders of the original that are no class
    first_class: int = 0  # of the sorted names; earlier ones are trained on
    counted: bool = True
    role: str = "photo"


GROCERY_CREDIT = (
    "Marcus Klasson, Cheng Zhang, Hedvig Kjellström: A Hierarchical Grocery Store Image Dataset with Visual "
    "and Semantic Labels, WACV 2019"
)
CALTECH_CREDIT = "Fei-Fei Li, Marco Andreeto, Marc'Aurelio Ranzato, Pietro Perona: Caltech 101, CaltechDATA, 2022"
CLOTHING_CREDIT = "Alexey Grigorev and contributors: Clothing dataset (small)"


def _product(name: str) -> str:
    """A grocery class in words: "Apple/Golden-Delicious" -> "Golden Delicious apple"."""
    kind, _, variety = name.rpartition("/")
    words, kind = variety.replace("-", " "), kind.replace("-", " ").lower()
    return words if kind in words.lower() else f"{words} {kind}"


# Class names that are no plain noun, or are misspelt by their data set.
NAMES = {
    "joshua_tree": "a Joshua tree",
    "scissors": "a pair of scissors",
    "sea_horse": "a seahorse",
    "snoopy": "Snoopy",
    "water_lilly": "a water lily",
    "wild_cat": "a wildcat",
    "windsor_chair": "a Windsor chair",
    "yin_yang": "a yin and yang symbol",
    "longsleeve": "a long-sleeved top",
    "outwear": "a jacket or coat",
    "pants": "a pair of trousers",
    "shoes": "a pair of shoes",
    "shorts": "a pair of shorts",
    "t-shirt": "a T-shirt",
}


def _thing(name: str) -> str:
    """A class name as a noun with its article: "stop_sign" -> "a stop sign"."""
    words = name.replace("_", " ")
    return NAMES.get(name, f"{'an' if words[0] in 'aeiou' else 'a'} {words}")


DRAWS = (
    Draw(
        data_set="grocery-store",
        places=("grocery-store/iconic", "GroceryStoreDataset/dataset/iconic-images-and-descriptions"),
        per_class=1,
        caption=lambda name: f"{_product(name)}: the clean product picture.",
        licence="MIT",
        credit=GROCERY_CREDIT,
        role="iconic",
    ),
    Draw(
        data_set="grocery-store",
        places=("grocery-store/test", "GroceryStoreDataset/dataset/test"),
        per_class=3,
        caption=lambda name: f"{_product(name)} in a grocery store, photographed with a phone.",
        licence="MIT",
        credit=GROCERY_CREDIT,
    ),
    Draw(
        data_set="caltech-101",
        places=("caltech-101/test", "101_ObjectCategories"),
        per_class=4,
        caption=lambda name: f"A picture of {_thing(name)}.",
        licence="CC-BY-4.0",
        credit=CALTECH_CREDIT,
        skip=frozenset({"BACKGROUND_Google"}),
        first_class=50,
    ),
    Draw(
        data_set="clothing-small",
        places=("clothing-small/test", "clothing-dataset-small/test"),
        per_class=5,
        caption=lambda name: f"A photograph of {_thing(name)}.",
        licence="CC0-1.0",
        credit=CLOTHING_CREDIT,
        counted=False,
    ),
)


def draw_demo(data: Path, out: Path) -> int:
    """Write the demo photographs of the data sets under `data` into `out`; gives their number.

    Replaces an earlier drawing in `out`. Raises DatasetError when a data set is missing or when
    `out/images` is not an earlier drawing, ImageError when a picture cannot be read.
    """
    images, listing, partial = out / "images", out / "demo.json", out / "images.partial"
    if images.exists() and not listing.exists():
        raise DatasetError(
            what="is not an earlier drawing, for demo.json is not beside it",
            where=str(images),
            fix="give another --out",
        )
    shutil.rmtree(partial, ignore_errors=True)
    photos = sorted((photo for draw in DRAWS for photo in _drawn(draw, data, partial)), key=lambda photo: photo["path"])
    shutil.rmtree(images, ignore_errors=True)
    partial.rename(images)
    content = json.dumps({"format_version": FORMAT_VERSION, "photos": photos}, indent=1, ensure_ascii=False)
    temporary = listing.with_suffix(".partial")
    temporary.write_text(content + "\n", encoding="utf-8")
    temporary.replace(listing)
    return len(photos)


def _drawn(draw: Draw, data: Path, images: Path) -> Iterator[dict[str, str | bool]]:
    """Write one draw's pictures below `images`, and give their entries of demo.json."""
    source = _open(draw, data)
    names = [name for name in source.class_names if name not in draw.skip][draw.first_class :]
    for name in names:
        rows = np.flatnonzero(source.labels == source.class_names.index(name))
        # Evenly spaced: neighbours in a shop's test set are often the same shelf a second later.
        chosen = np.unique(np.linspace(0, len(rows) - 1, draw.per_class).round().astype(int))
        class_name = _without_supercategory(name)
        folder = class_name.replace("/", "-")
        for number, row in enumerate(rows[chosen], start=1):
            content = _small_webp(source.images[int(row)])
            path = Path(draw.data_set, folder, f"{draw.role}-{number}.webp")
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            (images / path).write_bytes(content)
            yield {
                "path": f"images/{path.as_posix()}",
                "set": draw.data_set,
                "class": folder,
                "caption": draw.caption(class_name),
                "licence": draw.licence,
                "credit": draw.credit,
                "counted": draw.counted,
                "role": draw.role,
                "sha256": hashlib.sha256(content).hexdigest(),
            }


def _open(draw: Draw, data: Path) -> LabelledImages:
    parquet, original = draw.places
    if (data / original).is_dir():
        return read_dataset(data / original)
    return read_dataset(data / parquet)


def _without_supercategory(name: str) -> str:
    """The original sorts grocery classes into three folders: "Fruit/Apple/Pink-Lady" -> "Apple/Pink-Lady"."""
    first, _, rest = name.partition("/")
    return rest if rest and first in {"Fruit", "Packages", "Vegetables"} else name


def _small_webp(source: ImageSource) -> bytes:
    """The picture as WebP, short side at most 160 px; one that is so already keeps its bytes."""
    if isinstance(source, bytes):
        with Image.open(io.BytesIO(source)) as found:
            if found.format == "WEBP" and min(found.size) <= SHORT_SIDE:
                return source
    image = open_image(source)
    scale = SHORT_SIDE / min(image.size)
    if scale < 1:
        width, height = image.size
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=QUALITY, method=6)
    return encoded.getvalue()


def main(
    out: Annotated[Path, typer.Option(help="Folder to write images/ and demo.json into.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; else MATVIT_DATA.")] = None,
) -> None:
    """Draw the demo photographs from their data sets."""
    try:
        count = draw_demo(data or data_folder(), out)
    except MatVitError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{count} photographs in {os.fspath(out)}", err=True)


if __name__ == "__main__":
    typer.run(main)
