"""Pictures as nobody should make them: `mutated(seed)` gives one, always the same for a seed. Not a test: a helper.

Whole ones of every format and mode that is read, and what damage, carelessness or malice makes of them.
"""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from functools import cache

from PIL import Image, ImageFilter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".mpo", ".JPG", ".jfif")
RARE = 400  # one in so many takes long to decode
_MARKS = re.compile(  # where something begins in one of the formats: places to cut at
    rb"\xff[\xc0-\xfe]|IHDR|PLTE|tRNS|iCCP|IDAT|IEND|fcTL|RIFF|WEBP|VP8[ LX]|ALPH|ANIM|ANMF|EXIF|ICCP|Exif|ftyp|meta"
    rb"|iloc|mdat|av01|GIF8[79]a|\x21[\xf9\xfe\xff]|\x2c\0\0|II\*\0|MM\0\*"
)
_PNG = b"\x89PNG\r\n\x1a\n"


def mutated(seed):
    """A file name that tells what was done, and the file's content."""
    chance = random.Random(seed)
    suffix = chance.choice(SUFFIXES)
    if seed % RARE == RARE - 1:
        kind, make = _pick(COSTLY, seed // RARE)
        data = make(chance)
    elif seed % 4 == 3:
        kind, make = _pick(MADE, seed // 4)
        data = make(chance)
    else:
        whole, base, own_suffix = chance.choice(pictures())
        change, function = _pick(CHANGES, seed // 4 * 3 + seed % 4)
        kind, data = f"{whole}-{change}", function(base, chance)
        suffix = suffix if chance.random() < 0.1 else own_suffix
    return f"{seed:06d}-{kind}{suffix}", data


def _pick(functions, number):
    function = functions[number % len(functions)]
    return function.__name__, function


# --- whole pictures -----------------------------------------------------------------------------


def _encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _scene(mode, size=(40, 30)):
    noise = Image.frombytes("RGB", (8, 6), random.Random(mode).randbytes(8 * 6 * 3))
    image = noise.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.EDGE_ENHANCE)
    return (
        Image.frombytes(mode, size, random.Random(1).randbytes(2 * size[0] * size[1]))
        if mode == "I;16"
        else (image.convert("L").convert(mode) if mode in {"I", "F", "LA"} else image.convert(mode))
    )


def _exif(orientation=6):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    return exif.tobytes()


_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "1"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"),
    "AVIF": ("RGB", "RGBA"),
}
_SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_TIFF_PACKED = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd", "group3", "group4")


@cache
def pictures():
    """(name, content, suffix) of whole ones: every format, mode and size that matters."""
    found = []

    def add(name, kind, image, **options):
        found.append((f"{kind}-{name}".replace(";", ""), _encode(image, kind, **options), _SUFFIX.get(kind, ".avif")))

    for kind, modes in _MODES.items():
        for mode in modes:
            add(mode, kind, _scene(mode))
        for size in ((1, 1), (1, 70), (90, 1)):
            add("x".join(map(str, size)), kind, _scene("L" if kind == "GIF" else "RGB", size))
        if kind != "BMP":
            frames = [_scene("RGB").rotate(angle) for angle in (10, 20, 30)]
            extra = {} if kind in {"JPEG", "TIFF"} else {"duration": 20}
            add(
                "frames", "MPO" if kind == "JPEG" else kind, _scene("RGB"), save_all=True, append_images=frames, **extra
            )
        if kind not in {"BMP", "GIF"}:
            add("exif", kind, _scene("RGB"), exif=_exif())
            add("icc", kind, _scene("RGB"), icc_profile=random.Random(2).randbytes(500))
    add("progressive", "JPEG", _scene("RGB"), progressive=True, quality=90, subsampling=0)
    add("large", "JPEG", _scene("RGB", (400, 300)), progressive=True, restart_marker_rows=1)
    add("lossless", "WEBP", _scene("RGBA"), lossless=True)
    add("transparent", "PNG", _scene("P"), transparency=3)
    add("transparent", "GIF", _scene("P"), transparency=3, interlace=1)
    for packed in _TIFF_PACKED:
        mode = "1" if packed.startswith("group") else "RGB"
        add(packed, "TIFF", _scene(mode), compression=packed)
    found.append(("PNG-interlaced", _interlaced_png(), ".png"))
    return found


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width, height, data, *chunks, depth=8, colour=2, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return _PNG + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _interlaced_png():
    passes = ((3, 2), (3, 2), (5, 2), (5, 4), (10, 4), (10, 8), (20, 7))  # columns and rows of 20 x 15, by Adam7
    random_ = random.Random(3)
    rows = (b"\0" + random_.randbytes(3 * columns) for columns, count in passes for _ in range(count))
    return _png(20, 15, zlib.compress(b"".join(rows)), interlace=1)


# --- changes ------------------------------------------------------------------------------------


def unchanged(data, chance):
    return data


def _place(data, chance):
    """Anywhere; or at the beginning, the end, or beside what a format marks."""
    marks = [match.start() + shift for match in _MARKS.finditer(data) for shift in (0, 1, 2, 4, 8)]
    return min(
        len(data),
        chance.choice(
            [
                chance.randrange(len(data) + 1),
                chance.randrange(64),
                max(0, len(data) - chance.randrange(16)),
                chance.choice(marks or [0]),
            ]
        ),
    )


def truncated(data, chance):
    return data[: _place(data, chance)]


def flipped(data, chance):
    spoilt = bytearray(data)
    for _ in range(2 ** chance.randrange(7)):
        place = chance.randrange(8 * len(spoilt))
        spoilt[place // 8] ^= 1 << place % 8
    return bytes(spoilt)


def flipped_and_fitted(data, chance):
    """The checksums of a PNG are made right again: what is behind them is reached."""
    spoilt, at = bytearray(flipped(data, chance)), len(_PNG)
    if not data.startswith(_PNG):
        return bytes(spoilt)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        spoilt[at : at + 4] = data[at : at + 4]
        check = zlib.crc32(spoilt[at + 4 : at + 8 + length])
        spoilt[at + 8 + length : at + 12 + length] = struct.pack(">I", check)
        at += 12 + length
    return bytes(spoilt)


def header_spoilt(data, chance):
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        spoilt[chance.randrange(min(len(spoilt), 200))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    return bytes(spoilt)


def number_spoilt(data, chance):
    """A field of 2 or 4 bytes becomes the least or the largest number."""
    field = chance.choice(
        [b"\0\0", b"\xff\xff", b"\xff\x7f", b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80"]
    )
    place = _place(data, chance)
    return data[:place] + field + data[place + len(field) :]


def run_spoilt(data, chance):
    place, length = _place(data, chance), chance.randrange(1, 100)
    filling = chance.choice([bytes(length), b"\xff" * length, chance.randbytes(length)])
    return data[:place] + filling + data[place + length :]


def shortened(data, chance):
    place = _place(data, chance)
    return data[:place] + data[place + chance.randrange(1, 64) :]


def lengthened(data, chance):
    place = _place(data, chance)
    return data[:place] + chance.choice([chance.randbytes(50), data[:200], data[place : place + 100]]) + data[place:]


def spliced(data, chance):
    other = chance.choice(pictures())[1]
    return data[: _place(data, chance)] + other[_place(other, chance) :]


def followed(data, chance):
    return data + chance.choice([bytes(100), chance.randbytes(1000), data, b"\xff\xd9", b"<?php ?>"])


CHANGES = (
    unchanged,
    truncated,
    flipped,
    flipped_and_fitted,
    header_spoilt,
    number_spoilt,
    run_spoilt,
    shortened,
    lengthened,
    spliced,
    followed,
)

# --- made to mislead ----------------------------------------------------------------------------


def nothing(chance):
    return b""


def zeros(chance):
    return bytes(chance.randrange(1, 5000))


def noise(chance):
    return chance.randbytes(chance.randrange(1, 5000))


def text(chance):
    return chance.choice(["<html>", "%PDF-1.7", "<svg/>", "no picture", "﻿ü"]).encode() * chance.randrange(1, 50)


def beginning(chance):
    magic = [b"\xff\xd8\xff", _PNG, b"RIFF\x40\0\0\0WEBPVP8 ", b"GIF89a", b"BM", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0"]
    return chance.choice([*magic, b"\0\0\0 ftypavif", b"\0\0\0\x18ftypheic"]) + chance.randbytes(chance.randrange(2000))


def claimed_size(chance):
    """A few bytes that claim to be a picture of any size."""
    width, height = (chance.choice([0, 1, 9999, 12000, 16383, 65535]) for _ in range(2))
    packed = bytearray(_encode(_scene("RGB"), "JPEG"))
    frame = packed.index(b"\xff\xc0")
    packed[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return chance.choice(
        [
            bytes(packed),
            _png(width, height, zlib.compress(b"0"), depth=chance.choice([1, 8]), colour=0),
            b"GIF89a"
            + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
            + bytes(6)
            + b"\x2c"
            + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
            + b"\x02\x02\x44\x01\0;",
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, -height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(45),
            _tiff(
                [
                    (256, 4, 1, width),
                    (257, 4, 1, height),
                    (258, 3, 1, 8),
                    (262, 3, 1, 1),
                    (273, 4, 1, 8),
                    (279, 4, 1, 9),
                ]
            ),
        ]
    )


def _tiff(entries, *, following=0):
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + struct.pack("<I", following)


def exif_spoilt(chance):
    """Orientations that are none, counts and places beyond the file, directories in a circle, 64 KB of it."""
    far = chance.choice([0, 7, 8, 2**31 - 1, 2**32 - 1])
    exif = b"Exif\0\0" + chance.choice(
        [
            _tiff([(0x0112, chance.randrange(14), chance.choice([1, 2, far]), chance.choice([0, 9, 65535]))]),
            _tiff([(0x010F, 2, far, far), (0x0112, 3, 1, 8)], following=8),
            _tiff([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8), (0x0112, 3, 1, 6)], following=far),
            _tiff([(number, 5, 9, far) for number in range(5000)]),
            chance.randbytes(65000),
            b"",
        ]
    )
    return _encode(_scene("RGB", (16, 12)), chance.choice(["JPEG", "PNG", "WEBP"]), exif=exif)


def exif_of_megabytes(chance):
    """A valid orientation, and some MB of what a camera's maker wrote."""
    size = chance.randrange(2**20, 8 * 2**20)
    exif = _tiff([(0x0112, 3, 1, 6), (0x927C, 7, size, 38)]) + bytes(size)
    kind = chance.choice(["JPEG", "PNG", "WEBP"])
    if kind != "JPEG":
        return _encode(_scene("RGB", (16, 12)), kind, exif=exif)
    data = _encode(_scene("RGB", (16, 12)), kind)  # each of a JPEG's segments has less than 64 KB
    parts = (b"Exif\0\0" + exif[start : start + 65000] for start in range(0, len(exif), 65000))
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts) + data[2:]


def directories_in_a_circle(chance):
    picture = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 0)]
    more = [(278, 3, 1, 2), (279, 4, chance.choice([1, 2**20, 2**32 - 1]), 4), (330, 4, 1, 8)]
    return _tiff(picture + more, following=8) + bytes(20)


def many_texts(chance):
    texts = [_chunk(b"tEXt", b"name\0" + chance.randbytes(9).hex().encode()) for _ in range(3000)]
    return _png(2, 2, zlib.compress(bytes(14)), *texts)


def unpacking_text(chance):
    """Some KB that unpack to 20 MB."""
    packed = zlib.compress(bytes(20 * 2**20), 9)
    kind, content = chance.choice([(b"zTXt", b"name\0\0"), (b"iCCP", b"name\0\0"), (b"iTXt", b"name\0\1\0\0\0")])
    return _png(2, 2, zlib.compress(bytes(14)), _chunk(kind, content + packed))


def unpacking_rows(chance):
    """More rows than the header tells of."""
    return _png(2, 2, zlib.compress(bytes(5 * 2**20), 9))


def many_frames(chance):
    frame = b"\x21\xf9\x04\0\0\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0x80, 0, 0) + bytes(6) + frame * chance.randrange(2, 5000) + b";"


def many_scans(chance):
    return scans(_scene("RGB", (64, 48)), chance.randrange(20, 2000))


def scans(image, count):
    """A progressive JPEG whose last scan is there so many times."""
    data = _encode(image, "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * count + data[end:]


MADE = (
    nothing,
    zeros,
    noise,
    text,
    beginning,
    claimed_size,
    exif_spoilt,
    exif_of_megabytes,
    directories_in_a_circle,
    many_texts,
    unpacking_text,
    unpacking_rows,
    many_frames,
    many_scans,
)

# --- made to take long --------------------------------------------------------------------------


@cache
def _zeros_packed(count):
    return zlib.compress(bytes(count), 9)


@cache
def _plain(size, kind, **options):
    return _encode(Image.new("RGB", size, "green"), kind, **options)


def large_png(chance):
    """150 megapixels in some KB."""
    return _png(15000, 10000, _zeros_packed(10000 * (15000 // 8 + 1)), depth=1, colour=0)


def large_interlaced_png(chance):
    return _png(6000, 6000, _zeros_packed(6000 * 6000 * 3 + 20000), interlace=1)


def large_webp(chance):
    return _plain((8000, 5000), "WEBP", lossless=True, quality=0, method=0)


def large_tiff(chance):
    width, height = 12000, 12000
    packed = _zeros_packed(width * height)
    head = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    return _tiff([*head, (273, 4, 1, 122), (277, 3, 1, 1), (278, 3, 1, height), (279, 4, 1, len(packed))]) + packed


def large_jpeg(chance):
    return _plain((9000, 9000), "JPEG", quality=1)


def large_scans(chance):
    """4 megapixels, a hundred times."""
    return scans(Image.new("RGB", (2000, 2000), "green"), 100)


def large_text(chance):
    return _png(2, 2, zlib.compress(bytes(14)), _chunk(b"iCCP", b"name\0\0" + _zeros_packed(2**28)))


COSTLY = (large_png, large_interlaced_png, large_webp, large_tiff, large_jpeg, large_scans, large_text)
