"""No file takes long to decode, or much memory: what is made to is refused, or bounded by bytes and pixels.

pytest -m slow -s tests/matvit/test_decoding_limits.py    # the worst files that the limits let through, timed
"""

from __future__ import annotations

import io
import runpy
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matvit import preprocess
from matvit.errors import ImageError
from matvit.preprocess import Preprocessing, read_header

MADE = runpy.run_path(str(Path(__file__).parents[1] / "retrieval" / "mutations.py"))
PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
ROWS = zlib.compress(bytes(14))  # of a PNG of 2 x 2 pixels
chunk, png, tiff, scans = MADE["_chunk"], MADE["_png"], MADE["_tiff"], MADE["scans"]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_with(parts: bytes) -> bytes:
    plain = encode(Image.new("RGB", (16, 16)), "JPEG")
    return plain[:2] + parts + plain[2:]


def gif_with(parts: bytes) -> bytes:
    plain = encode(Image.new("L", (4, 4)), "GIF")
    place = plain.index(b"\x2c\0\0")
    return plain[:place] + parts + plain[place:]


def png_before_rows(parts: bytes) -> bytes:
    whole: bytes = png(2, 2, ROWS)
    place = whole.index(b"IDAT") - 4
    return whole[:place] + parts + whole[place:]


def packed_bmp(pairs: int) -> bytes:
    body = bytes([1, 5]) * pairs
    head = struct.pack("<IIIIiiHHIIiiII", 1078 + len(body), 0, 1078, 40, pairs, 1, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + head + bytes(1024) + body


def exif_with_shared_values(size: int) -> bytes:
    """300 tags, each of which claims nearly all of the block as its value."""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", 300)
    tags = b"".join(struct.pack("<HHII", number, 1, size - 100, 8) for number in range(300))
    return (head + tags).ljust(size, b"\0")


def tiff_of_jpeg(strip: bytes, *, strips: int) -> bytes:
    """2000 x 2000 pixels for each strip; all of them are the same bytes."""
    more = 8 + 2 + 9 * 12 + 4
    start = more + 6 + 8 * strips
    places = struct.pack(f"<{strips}I", *[start] * strips) + struct.pack(f"<{strips}I", *[len(strip)] * strips)
    at = (start, len(strip)) if strips == 1 else (more + 6, more + 6 + 4 * strips)
    entries = [(256, 4, 1, 2000), (257, 4, 1, 2000 * strips), (258, 3, 3, more), (259, 3, 1, 7), (262, 3, 1, 6)]
    entries += [(273, 4, strips, at[0]), (277, 3, 1, 3), (278, 4, 1, 2000), (279, 4, strips, at[1])]
    whole: bytes = tiff(entries) + struct.pack("<HHH", 8, 8, 8) + places + strip
    return whole


MANY_PARTS = {
    "JPEG comments": lambda count: jpeg_with(b"\xff\xfe\0\2" * count),
    "JPEG padding": lambda count: jpeg_with(b"\xff" * count),
    "PNG chunks": lambda count: png(2, 2, ROWS, chunk(b"aaAa", b"") * count),
    "PNG rows in empty chunks": lambda count: png_before_rows(chunk(b"IDAT", b"") * count),
    "PNG chunks after the rows": lambda count: png(2, 2, ROWS)[:-12] + chunk(b"aaAa", b"") * count,
    "GIF comments": lambda count: gif_with(b"\x21\xfe\0" * count),
    "BMP runs": packed_bmp,
    "BigTIFF tags": lambda count: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + bytes(20 * count),
}


@pytest.mark.parametrize("kind", MANY_PARTS)
def test_a_file_of_endless_parts_is_refused_after_some_of_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MANY_PARTS[kind](20_000)
    monkeypatch.setattr(preprocess, "MAX_READS", 10_000)
    with pytest.raises(ImageError, match="too many parts"):
        PLAIN(data, size=28)


def test_exif_that_grows_by_copying_is_refused() -> None:
    segment = b"\xff\xe1" + struct.pack(">H", 60000) + b"Exif\0\0".ljust(59998, b"x")
    with pytest.raises(ImageError, match="too many parts"):
        PLAIN(jpeg_with(segment * 200), size=28)


@pytest.mark.filterwarnings("ignore:Tag data larger:UserWarning")
@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_tags_that_share_their_bytes_take_no_more_memory_than_the_file(kind: str) -> None:
    exif = exif_with_shared_values(2**20)
    data = exif if kind == "TIFF" else png_before_rows(chunk(b"eXIf", exif))
    tracemalloc.start()
    try:
        if kind == "TIFF":
            with pytest.raises(ImageError):
                PLAIN(data, size=28)
        else:
            PLAIN(data, size=28)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


def test_scans_are_counted_with_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = scans(Image.new("RGB", (64, 48)), 50)
    assert PLAIN(data, size=28).shape == (3, 28, 28)
    monkeypatch.setattr(preprocess, "MAX_SCANNED_PIXELS", 40 * 64 * 48)
    with pytest.raises(ImageError, match="scans"):
        PLAIN(data, size=28)


def test_jpeg_strips_of_a_tiff_that_overlap_are_refused() -> None:
    strip = encode(Image.new("RGB", (2000, 2000), "green"), "JPEG", subsampling=0)
    assert PLAIN(tiff_of_jpeg(strip, strips=1), size=28).shape == (3, 28, 28)
    with pytest.raises(ImageError, match="strips overlap"):
        PLAIN(tiff_of_jpeg(strip, strips=3), size=28)


@pytest.mark.parametrize("as_path", [False, True])
def test_a_file_of_too_many_bytes_is_refused(as_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_FILE_BYTES", 100)
    data = encode(Image.new("RGB", (16, 16)), "PNG") + bytes(100)
    (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(ImageError, match="has more than"):
        PLAIN(tmp_path / "large.png" if as_path else data, size=28)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "PNG", "JPEG"])
def test_a_header_tells_the_memory_that_decoding_takes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    options = {"AVIF": {"speed": 10}, "WEBP": {"lossless": True, "quality": 0, "method": 0}}.get(kind, {})
    path.write_bytes(encode(Image.new("RGB", (5000, 4000)), kind, **options))
    program = """
        import re, sys
        from pathlib import Path
        from matvit.preprocess import Preprocessing

        def peak():  # bytes
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        data, before = Path(sys.argv[1]).read_bytes(), peak()
        Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))(data, size=168)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    with path.open("rb") as file:
        header = read_header(file, path=path)
    assert header is not None
    assert (header.width, header.height) == (5000, 4000)
    assert taken < header.memory + 20 * 2**20


WIDTH, HEIGHT = 15000, 11900  # nearly MAX_PIXELS


def packed_zeros(row: int) -> bytes:
    return zlib.compress(bytes(HEIGHT * row), 1)


def float_tiff() -> bytes:
    data = packed_zeros(4 * WIDTH)
    entries = [(256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (258, 3, 1, 32), (259, 3, 1, 8), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 134), (277, 3, 1, 1), (278, 4, 1, HEIGHT), (279, 4, 1, len(data)), (339, 3, 1, 3)]
    return bytes(tiff(entries)) + data


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


WORST = {
    "JPEG of 700 scans": lambda: scans(noise(2000, 2000), 700),
    "JPEG of noise, 24 megapixels": lambda: encode(noise(6000, 4000), "JPEG", quality=100, subsampling=0),
    "JPEG comments": lambda: jpeg_with(b"\xff\xfe\0\2" * preprocess.MAX_READS),
    "JPEG EXIF segments": lambda: jpeg_with((b"\xff\xe1\xff\xff" + b"Exif\0\0".ljust(65533, b"x")) * 99),
    "PNG chunks": lambda: png(2, 2, ROWS, chunk(b"aaAa", b"") * preprocess.MAX_READS),
    "PNG, 16-bit RGBA": lambda: png(WIDTH, HEIGHT, packed_zeros(8 * WIDTH + 1), depth=16, colour=6),
    "TIFF of floats": float_tiff,
    "TIFF of a JPEG of noise, 80 scans": lambda: tiff_of_jpeg(scans(noise(2000, 2000), 80), strips=1),
    "BMP runs": lambda: packed_bmp(preprocess.MAX_READS),
    "WebP, lossless": lambda: encode(Image.new("RGB", (WIDTH, HEIGHT)), "WEBP", lossless=True, quality=0, method=0),
    "AVIF": lambda: encode(Image.new("RGB", (WIDTH, HEIGHT)), "AVIF", speed=10),
    "AVIF of noise, 4 megapixels": lambda: encode(noise(2000, 2000), "AVIF", quality=100, speed=10),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
def test_the_worst_files_that_the_limits_let_through_take_seconds(kind: str) -> None:
    """Pixels that cannot be packed are bounded by a file's bytes: they are timed in smaller files."""
    data = WORST[kind]()
    start, result = time.process_time(), "read"
    try:
        PLAIN(data, size=168)
    except ImageError as error:
        result = error.what
    seconds = time.process_time() - start
    print(f"\n{kind}: {len(data) / 1e6:.1f} MB, {seconds:.1f} s, {result}")
    assert seconds * (preprocess.MAX_FILE_BYTES / len(data) if "noise" in kind else 1) < 60
