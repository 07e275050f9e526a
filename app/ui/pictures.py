"""Pictures on the page: square thumbnails, the HTML of a hit, and names that are shown as they are."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matvit.preprocess import ImageSource, open_image, resize_centre_square

THUMBNAIL = 240  # pixels a side
_NAME = 32  # characters that fit under a hit, in two lines

# Theme-neutral: every colour is mixed from the text's own, so that light and dark both have contrast.
STYLE = """<style>
.matvit-hit { border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-radius: 10px;
  overflow: hidden; margin: 0; min-width: 0; position: relative; }
.matvit-hit img, .matvit-gone { display: flex; width: 100%; aspect-ratio: 1; object-fit: cover; margin: 0;
  align-items: center; justify-content: center; text-align: center; font-size: 0.85rem;
  background: color-mix(in srgb, currentColor 8%, transparent); }
.matvit-hit figcaption { padding: 8px 10px 10px; line-height: 1.3; }
.matvit-facts { display: flex; justify-content: space-between; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
.matvit-facts b { font-weight: 650; }
.matvit-name { margin-top: 2px; font-size: 0.875rem; height: 2.6em; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; opacity: 0.85; }
.matvit-strange { border: 2px dashed #d97706; }
.matvit-badge { position: absolute; top: 7px; left: 7px; padding: 2px 8px; border-radius: 999px;
  font-size: 0.75rem; font-weight: 650; background: #b45309; color: #fff; }
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One hit as it is shown."""

    rank: int
    score: float
    name: str  # shown, if need be shortened
    title: str  # shown when the pointer rests on it
    image: bytes | None  # WebP; None when the file is gone, or not the one that was indexed
    strange: bool  # XL does not have it


def thumbnail(source: ImageSource) -> bytes:
    """The centre square of a picture as a small WebP. Raises ImageError."""
    small = resize_centre_square(open_image(source, draft_size=2 * THUMBNAIL), THUMBNAIL)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=82)
    return out.getvalue()


def figure(tile: Tile) -> str:
    """The tile as HTML, every text escaped; it needs STYLE."""
    name, title = escape(shortened(readable(tile.name))), escape(readable(tile.title))
    gone = '<div class="matvit-gone">picture<br>not there</div>'
    picture = gone if tile.image is None else labelled(tile.image, tile.name, title=tile.title)
    badge = '<span class="matvit-badge">not in XL</span>' if tile.strange else ""
    return (
        f'<figure class="matvit-hit{" matvit-strange" if tile.strange else ""}" title="{title}">{picture}{badge}'
        f'<figcaption><div class="matvit-facts"><b>{tile.rank}</b><span>{tile.score:.3f}</span></div>'
        f'<div class="matvit-name">{name}</div></figcaption></figure>'
    )


def labelled(image: bytes, name: str, *, title: str | None = None) -> str:
    """A WebP picture as HTML, with its whole name for who cannot see it, and for who rests the pointer on it."""
    name, title = escape(readable(name)), escape(readable(title or name))
    return f'<img alt="{name}" title="{title}" src="data:image/webp;base64,{base64.b64encode(image).decode("ascii")}">'


def telling_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all apart: "1.jpg", but "cats/1.jpg" where there is "dogs/1.jpg"."""
    names: list[str] = []
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def shortened(name: str, *, most: int = _NAME) -> str:
    """Both ends of a name of more than `most` characters: what tells it apart is its file's number, or a folder."""
    return name if len(name) <= most else f"{name[: most // 3]}…{name[most // 3 + 1 - most :]}"


def readable(name: str) -> str:
    """A file name may hold bytes that are no text, which a browser cannot be sent."""
    return name.encode("utf-8", "replace").decode("utf-8")


def plain(name: str) -> str:
    """`name` as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_{}\[\]()#+!$:<>~|&-])", r"\\\1", readable(name))
