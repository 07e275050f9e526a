"""Preprocessing: equal to timm's, and a short reason for whatever is no readable picture."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from matvit import preprocess
from matvit.errors import BackboneError, ImageError
from matvit.preprocess import MAX_PIXELS, Header, Preprocessing, open_image, read_header

PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # pixels from 0 to 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSSLESS = ("PNG", "BMP", "TIFF")
LOSSY = ("JPEG", "WEBP", "AVIF", "GIF")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def scene(width: int, height: int) -> Image.Image:
    """Smooth colours with some edges, as photographs have."""
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    pixels = np.stack([np.sin(x) * 90 + 128, np.cos(y + x) * 90 + 128, (np.sin(x * y) > 0) * 120 + 60], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def timm_transform() -> Callable[[Image.Image], Any]:
    """timm's evaluation transform with the same settings, before normalising."""
    data = pytest.importorskip("timm.data", reason="timm is what preprocessing is compared with")
    transform: Callable[[Image.Image], Any] = data.create_transform(
        112, interpolation="bilinear", crop_pct=1.0, mean=PLAIN.mean, std=PLAIN.std
    )
    return transform


# --- equal to timm ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    sides=st.one_of(
        st.tuples(st.integers(1, 330), st.integers(1, 330)),
        st.tuples(st.integers(1, 4), st.integers(500, 2000)),  # extreme strips
    ),
    lying=st.booleans(),
    kind=st.sampled_from(["PNG", "JPEG"]),
    seed=st.integers(0, 99),
)
def test_pixels_equal_timms_evaluation_transform_within_one_level(
    timm_transform: Callable[[Image.Image], Any], sides: tuple[int, int], lying: bool, kind: str, seed: int
) -> None:
    width, height = sides[::-1] if lying else sides
    source = encode(noise(width, height, seed=seed), kind)  # JPEGs below 448 px are not drafted
    expected = np.asarray(timm_transform(Image.open(io.BytesIO(source)).convert("RGB")))
    assert np.abs(PLAIN(source, size=112) - expected).max() <= 1.001 / 255


def test_normalising_is_timms_mean_and_std(timm_transform: Callable[[Image.Image], Any]) -> None:
    source = encode(scene(200, 150), "PNG")
    plain, normalised = PLAIN(source, size=112), Preprocessing(mean=MEAN, std=STD)(source, size=112)
    assert (normalised.shape, normalised.dtype) == ((3, 112, 112), np.float32)
    assert normalised.flags.c_contiguous
    for channel in range(3):
        np.testing.assert_allclose(normalised[channel], (plain[channel] - MEAN[channel]) / STD[channel], atol=1e-5)


def test_the_centre_square_is_kept_and_the_rest_is_cut() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    for upright in (image, image.transpose(Image.Transpose.ROTATE_90)):
        pixels = PLAIN(upright, size=50)[:, 1:-1, 1:-1]  # the outermost blend with what lies beyond
        assert pixels[0].max() == 0
        assert pixels[2].min() == 1


def test_large_jpegs_are_drafted_and_stay_close_to_the_full_decoding() -> None:
    source = encode(scene(1500, 1100), "JPEG", quality=90)
    full = Preprocessing(mean=PLAIN.mean, std=PLAIN.std, jpeg_scale=0)
    difference = np.abs(PLAIN(source, size=112) - full(source, size=112))
    assert 0 < difference.mean() <= 4 / 255
    assert min(open_image(source, draft_size=224).size) < 1100  # so that the comparison means something


def test_a_jpeg_opened_with_pillow_gives_the_pixels_of_its_file_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x112] = 6
    scene(1500, 1100).save(path, exif=exif)
    with Image.open(path) as image:
        for size in (112, 28, 112):
            np.testing.assert_array_equal(PLAIN(image, size=size), PLAIN(path, size=size))
        assert image.size == (1500, 1100)
        with Image.open(path) as untouched:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(untouched))


def test_pixels_that_the_caller_chose_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    scene(1500, 1100).save(path)
    full = Preprocessing(mean=PLAIN.mean, std=PLAIN.std, jpeg_scale=0)
    decoded, drafted = Image.open(path), Image.open(path)
    decoded.load()
    decoded.paste("red", (0, 0, 1500, 1100))
    np.testing.assert_array_equal(PLAIN(decoded, size=28), PLAIN(Image.new("RGB", (1500, 1100), "red"), size=28))
    drafted.draft("RGB", (400, 400))
    np.testing.assert_array_equal(PLAIN(drafted, size=28), full(drafted, size=28))
    second = encode(Image.new("RGB", (500, 400), "red"), "MPO", save_all=True, append_images=[scene(500, 400)])
    with Image.open(io.BytesIO(second)) as views:
        views.seek(1)
        np.testing.assert_array_equal(PLAIN(views, size=28), full(views, size=28))


@settings(max_examples=25)
@given(width=st.integers(30, 900), height=st.integers(30, 900), draft=st.integers(1, 300))
def test_drafting_never_goes_below_the_asked_size(width: int, height: int, draft: int) -> None:
    source = encode(Image.new("L", (width, height), 77), "JPEG")
    drafted = open_image(source, draft_size=draft)
    assert min(drafted.size) >= min(draft, width, height)
    assert drafted.mode == "RGB"


# --- every kind of picture ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
def test_every_format_is_read_from_bytes_file_and_path_text(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (200, 100, 50))
    path = tmp_path / "picture.without-a-telling-suffix"
    path.write_bytes(encode(image, kind))
    for source in (path.read_bytes(), path, str(path)):
        opened = open_image(source)
        assert (opened.mode, opened.size) == ("RGB", (40, 20))
        np.testing.assert_allclose(opened.getpixel((5, 5)), (200, 100, 50), atol=0 if kind in LOSSLESS else 6)


def test_pictures_of_two_views_give_the_first() -> None:
    first, second = Image.new("RGB", (40, 20), (250, 0, 0)), Image.new("RGB", (40, 20), (0, 0, 250))
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "MPO"):
        opened = open_image(encode(first, kind, save_all=True, append_images=[second]))
        np.testing.assert_allclose(opened.getpixel((5, 5)), (250, 0, 0), atol=6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_are_turned_upright(kind: str, orientation: int) -> None:
    stored = Image.new("RGB", (64, 32))
    for index, colour in enumerate(["red", "lime", "blue", "white"]):
        left, top = 32 * (index % 2), 16 * (index // 2)
        stored.paste(colour, (left, top, left + 32, top + 16))
    corners = np.array([["red", "lime"], ["blue", "white"]])
    seen = {  # as the EXIF standard says where the stored first row and column belong
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.T,
        6: np.rot90(corners, -1),
        7: corners[::-1, ::-1].T,
        8: np.rot90(corners),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    opened = open_image(encode(stored, kind, exif=exif))
    assert opened.size == ((64, 32) if orientation < 5 else (32, 64))
    expected = Image.new("RGB", opened.size)
    half_width, half_height = opened.width // 2, opened.height // 2
    for (row, column), colour in np.ndenumerate(seen):
        left, top = column * half_width, row * half_height
        expected.paste(str(colour), (left, top, left + half_width, top + half_height))
    assert np.abs(np.asarray(opened, dtype=float) - np.asarray(expected)).mean() < 12


def test_an_upright_pil_image_is_left_as_it_was() -> None:
    given_image = Image.new("RGB", (5, 3), "red")
    opened = open_image(given_image)
    opened.paste("blue", (0, 0, 5, 3))
    assert given_image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_damage_the_picture() -> None:
    source = encode(Image.new("RGB", (40, 20), "red"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage")
    assert open_image(source).size == (40, 20)


def test_cmyk_is_read_as_the_colour_it_prints() -> None:
    for kind in ("JPEG", "TIFF"):
        opened = open_image(encode(Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK"), kind))
        np.testing.assert_allclose(opened.getpixel((3, 3)), (200, 100, 50), atol=4)


@pytest.mark.parametrize(
    ("values", "kind", "grey"),
    [
        (np.full((8, 8), 32768, np.uint16), "PNG", 127),
        (np.full((8, 8), 65535, np.uint16), "TIFF", 255),
        (np.full((8, 8), 200, np.uint16), "PNG", 0),  # a dark 16-bit picture stays dark
        (np.full((8, 8), 32768, np.int32), "TIFF", 127),
        (np.full((8, 8), 200, np.int32), "TIFF", 200),
        (np.full((8, 8), 0.5, np.float32), "TIFF", 127),
        (np.full((8, 8), 200.0, np.float32), "TIFF", 200),
    ],
)
def test_wide_greyscale_is_scaled_rather_than_clipped(values: np.ndarray[Any, Any], kind: str, grey: int) -> None:
    assert open_image(encode(Image.fromarray(values), kind)).getpixel((0, 0)) == (grey,) * 3


def test_a_pixel_without_a_value_does_not_change_the_others() -> None:
    values = np.full((8, 8), 0.5, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    opened = open_image(encode(Image.fromarray(values), "TIFF"))
    assert [opened.getpixel((x, 0)) for x in range(4)] == [(grey,) * 3 for grey in (0, 255, 0, 127)]
    for nothing in (np.nan, np.inf, -np.inf):
        blank = encode(Image.fromarray(np.full((8, 8), nothing, np.float32)), "TIFF")
        assert refusal(blank).what == "damaged picture (no pixel has a finite value)"


def test_transparent_pixels_become_white_in_every_mode() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    sources = [
        encode(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG"),
        encode(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "WEBP", lossless=True),
        encode(Image.new("LA", (4, 4), (10, 0)), "PNG"),
        encode(palette, "PNG", transparency=1),
        encode(Image.new("L", (4, 4), 7), "PNG", transparency=7),
        encode(Image.new("RGB", (4, 4), (7, 8, 9)), "PNG", transparency=(7, 8, 9)),
    ]
    assert [open_image(source).getpixel((0, 0)) for source in sources] == [(255, 255, 255)] * len(sources)
    assert open_image(encode(palette, "PNG")).getpixel((0, 0)) == (255, 0, 0)
    half = open_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128))).getpixel((0, 0))
    assert half == (127, 127, 127)


@pytest.mark.parametrize("kind", ["I;16", "F", "RGBA"])
def test_pictures_are_converted_in_pieces_without_seams(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (70, 90)).astype(np.uint16)
    images = {
        "I;16": Image.fromarray(values),
        "F": Image.fromarray(values.astype(np.float32)),
        "RGBA": Image.frombytes("RGBA", (45, 70), values.tobytes()),
    }
    whole = open_image(images[kind])
    monkeypatch.setattr(preprocess, "_TILE", 16)
    np.testing.assert_array_equal(np.asarray(open_image(images[kind])), np.asarray(whole))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_large_pictures_take_little_more_memory_than_their_pixels(mode: str) -> None:
    """25 megapixels are 50 or 100 MB as decoded and 100 MB in RGB; all at once, they would take 500 MB and more."""
    program = """
        import io, re, sys
        from pathlib import Path
        from PIL import Image
        from matvit.preprocess import open_image

        def peak():  # MB
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

        file = io.BytesIO()
        Image.new(sys.argv[1], (5000, 5000)).save(file, "PNG", compress_level=1)
        before = peak() - 25 * (2 if sys.argv[1] == "I;16" else 4)  # what making the file took
        open_image(file.getvalue())
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), mode]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 300


def test_a_batch_stacks_pictures_of_any_shape_and_may_be_empty() -> None:
    batch = PLAIN.batch([scene(30, 90), encode(scene(200, 20), "PNG")], size=28)
    assert (batch.shape, batch.dtype) == ((2, 3, 28, 28), np.float32)
    np.testing.assert_array_equal(batch[0], PLAIN(scene(30, 90), size=28))
    assert PLAIN.batch([], size=28).shape == (0, 3, 28, 28)


# --- what cannot be read ------------------------------------------------------------------------


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A few bytes whose header claims a picture of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def refusal(source: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        PLAIN(source, size=28)
    return caught.value


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_files_are_refused_not_padded_with_grey(kind: str, kept: float) -> None:
    whole = encode(noise(90, 70), kind)
    error = refusal(whole[: int(len(whole) * kept)])
    assert error.what.startswith(("damaged picture (", "not a picture"))
    assert len(error.what) < 120


@settings(max_examples=150)
@given(kind=st.sampled_from(LOSSLESS + LOSSY), place=st.floats(0, 0.999), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_picture_or_an_image_error_and_nothing_else(kind: str, place: float, value: int) -> None:
    content = bytearray(encode(scene(24, 18), kind))
    content[int(place * len(content))] = value
    with suppress(ImageError):
        assert PLAIN(bytes(content), size=28).shape == (3, 28, 28)


@pytest.mark.parametrize("content", [b"", b"<html>not a picture</html>", b"%PDF-1.7", b"\xff\xd8", b"GIF89a"])
def test_bytes_that_are_no_picture_get_a_short_reason(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "upload.jpg"
    path.write_bytes(content)
    for source, where in [(content, "picture"), (path, str(path))]:
        error = refusal(source)
        assert error.where == where
        assert error.what == "not a picture in a supported format" or error.what.startswith("damaged picture (")
    assert str(error).endswith("give a readable JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file")


@pytest.mark.parametrize("sides", [(50_000, 50_000), (MAX_PIXELS // 10_000 + 1, 10_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(sides: tuple[int, int]) -> None:
    assert refusal(png_of_claimed_size(*sides)).what == "has more than 178 megapixels"


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_a_large_picture_below_the_limit_is_read_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above it, and refuses twice as much
    source, filters = encode(Image.new("RGBA", (10, 6)), kind, **options), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:  # a warning is an error in these tests
        assert {image.size for image in pool.map(open_image, [source] * 200)} == {(10, 6)}
    assert list(warnings.filters) == filters


def test_a_file_that_comes_slowly_keeps_no_other_picture_waiting(tmp_path: Path) -> None:
    arrives = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            arrives.wait()
            return super().read(size)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(read_header, Slow(encode(scene(9, 8), "WEBP")), path="slow.webp")
        try:
            assert pool.submit(open_image, encode(scene(7, 6), "JPEG")).result(timeout=30).size == (7, 6)
        finally:
            arrives.set()
        assert slow.result() == Header(9, 8, 16 * 9 * 8)


def test_the_limit_holds_where_a_program_has_lifted_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(png_of_claimed_size(20_000, 20_000)).what == "has more than 178 megapixels"


def test_missing_files_folders_and_formats_off_the_list_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.jpg").what == "no such file"
    assert refusal(str(tmp_path)).what == "is a folder, not a picture"
    os.mkfifo(tmp_path / "pipe.jpg")  # without anybody who writes to it
    assert refusal(tmp_path / "pipe.jpg").what == "is a pipe, a socket or a device, not a picture"
    assert refusal("/dev/zero").what == "is a pipe, a socket or a device, not a picture"
    assert refusal("nul\0byte.jpg").what == "damaged picture (embedded null byte)"
    assert refusal(encode(Image.new("RGB", (4, 4)), "PPM")).what == "not a picture in a supported format"
    assert refusal(encode(Image.new("RGB", (4, 4)), "PDF")).what == "not a picture in a supported format"


def test_a_heic_picture_is_said_to_need_converting(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # how an iPhone's photograph begins
    misnamed, cut = tmp_path / "photo.jpg", tmp_path / "photo.HEIC"
    misnamed.write_bytes(heic)
    cut.write_bytes(heic[:6])
    for source in (heic, misnamed, str(misnamed), cut, str(cut)):
        assert refusal(source).what == "is a HEIC picture, which needs converting to JPEG first"
    cut.write_bytes(encode(scene(9, 9), "JPEG"))
    assert PLAIN(cut, size=28).shape == (3, 28, 28)  # the content decides


def test_a_camera_raw_picture_is_said_to_need_converting_not_taken_for_the_preview_in_it(tmp_path: Path) -> None:
    preview, other = tmp_path / "photo.NEF", tmp_path / "photo.raf"
    preview.write_bytes(encode(scene(9, 9), "TIFF"))
    other.write_bytes(b"FUJIFILMCCD-RAW " + bytes(100))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    dng = encode(scene(9, 9), "TIFF", tiffinfo=tags)
    for source in (preview, str(other), dng):
        assert refusal(source).what == "is a camera raw picture, which needs converting to JPEG first"
    preview.write_bytes(encode(scene(9, 9), "JPEG"))
    assert PLAIN(preview, size=28).shape == (3, 28, 28)  # the content decides


def test_a_pil_image_without_pixels_is_refused() -> None:
    assert refusal(Image.new("RGB", (0, 5))).what == "damaged picture (no pixels)"


def test_a_batch_names_the_first_unreadable_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"second\.png: no such file"):
        PLAIN.batch([scene(9, 9), tmp_path / "second.png", tmp_path / "third.png"], size=28)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": "none"}, "crop 'none'"),
        ({"resize": "nearest"}, "resize 'nearest'"),
        ({"std": (0.5, 0, 0.5)}, "std"),
        ({"std": (0.5, 1e-50, 0.5)}, "std"),  # 0 in float32
        ({"mean": (0.5, float("nan"), 0.5)}, "mean"),
        ({"mean": (1e40, 0.5, 0.5)}, "mean"),
        ({"mean": (0.5,)}, "mean"),
        ({"jpeg_scale": -1}, "jpeg_scale -1"),
        ({"jpeg_scale": 0.5}, "jpeg_scale 0.5"),
    ],
)
def test_what_gives_no_pixels_or_the_same_under_another_identity_is_refused_when_made(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(BackboneError, match=f"^preprocessing: {words}"):
        Preprocessing(**{"mean": MEAN, "std": STD} | change)


def test_json_has_stable_keys_for_the_identity_of_the_space() -> None:
    assert Preprocessing(mean=MEAN, std=STD).to_json() == {
        "mean": list(MEAN),
        "std": list(STD),
        "crop": "centre-square",
        "resize": "bilinear-antialiased",
        "jpeg_scale": 2,
    }


@given(seed=st.integers(0, 2**16))
def test_normalising_is_the_same_value_by_value_however_many_pictures_come(seed: int) -> None:
    ours = Preprocessing(mean=MEAN, std=STD)
    picture = noise(30, 20, seed=seed)
    pixels = ours.pixels(picture, size=16)
    alone = ((np.asarray(pixels, np.float32) / 255.0).transpose(1, 2, 0) - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_array_equal(ours(picture, size=16), alone.transpose(2, 0, 1), strict=True)
    np.testing.assert_array_equal(ours.normalise(np.stack([pixels] * 3))[2], ours(picture, size=16), strict=True)
