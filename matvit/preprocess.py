"""From a picture to the encoder's input: the same for gallery, query and evaluation; no torch.

Equal to timm's evaluation transform with the same settings (resize the short side, antialiased
bilinear, centre crop, normalise) within 1/255, except that large JPEGs are first decoded at a
reduced DCT scale, always and everywhere, which is part of the embedding space's identity.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401 - plugins register themselves
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    features,
)
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from matvit.errors import BackboneError, ImageError, NotDecodedError

FloatArray = npt.NDArray[np.float32]
PixelArray = npt.NDArray[np.uint8]


class Absent(bytes):
    """Empty bytes in the place of a picture that cannot be fetched, and why."""

    reason: str

    def __new__(cls, reason: str) -> Self:
        """`reason`: what an ImageError says of it."""
        absent = super().__new__(cls)
        absent.reason = reason
        return absent


ImageSource = str | os.PathLike[str] | bytes | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow opens MPO through JPEG
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit: larger ones are refused before decoding, as bombs
MAX_FILE_BYTES = 512 * 2**20  # larger files are no photographs; reading one whole could exhaust the memory
TOO_LARGE = f"has more than {MAX_FILE_BYTES // 2**20} MiB"
MAX_READS = 2_000_000  # by Pillow, of one file
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS  # by all scans of a progressive JPEG; cameras' and editors' have about ten
# With these limits, the worst file takes half a minute (docs/decisions/0010).
_BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 21}  # others: 8, a picture and a copy of it in RGB
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")
_DNG_VERSION = 50706  # a tag that makes a TIFF file a DNG
_TILE = 1024  # pixels a side: pictures that need arithmetic are converted in such pieces
_CODECS = ("jpg", "zlib", "libtiff", "webp", "avif")  # of FORMATS, those that a Pillow may lack
_FIX = "give a readable JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file"
_WARNINGS = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a picture becomes pixels; all of it except the resolution, which a spec may change.

    Raises BackboneError for what cannot be computed with.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: Literal["centre-square"] = "centre-square"
    resize: Literal["bilinear-antialiased"] = "bilinear-antialiased"
    jpeg_scale: int = 2  # JPEGs are decoded at the smallest DCT scale >= this x the input size; 0: full size

    def __post_init__(self) -> None:
        largest, smallest = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
        right = {
            "mean": len(self.mean) == 3 and all(abs(value) <= largest for value in self.mean),
            "std": len(self.std) == 3 and all(smallest <= value <= largest for value in self.std),
            "crop": self.crop == "centre-square",
            "resize": self.resize == "bilinear-antialiased",
            "jpeg_scale": isinstance(self.jpeg_scale, int) and self.jpeg_scale >= 0,
        }
        if wrong := [name for name, is_right in right.items() if not is_right]:
            raise BackboneError(
                what=f"{wrong[0]} {getattr(self, wrong[0])!r} cannot be computed with",
                where="preprocessing",
                fix="give three finite numbers as mean and as std, those above 0, and leave out what you do not change",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with stable keys (the embedding space's identity hashes them)."""
        # float(): the identity of mean=(0, 0, 0) is that of (0.0, 0.0, 0.0), which JSON gives back.
        return asdict(self) | {"mean": [float(x) for x in self.mean], "std": [float(x) for x in self.std]}

    def __call__(self, source: ImageSource, *, size: int) -> FloatArray:
        """One picture -> (3, size, size) float32, normalised.

        Raises ImageError when the picture cannot be read.
        """
        return self.normalise(self.pixels(source, size=size))

    def pixels(self, source: ImageSource, *, size: int) -> PixelArray:
        """One picture -> (3, size, size) uint8: all but `normalise`. Raises ImageError."""
        image = resize_centre_square(open_image(source, draft_size=self.jpeg_scale * size), size)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def normalise(self, pixels: PixelArray) -> FloatArray:
        """(..., 3, H, W) uint8 -> the same in float32, each value by itself, so that it is equal however many come."""
        mean, std = (np.asarray(values, np.float32)[:, np.newaxis, np.newaxis] for values in (self.mean, self.std))
        normalised: FloatArray = np.divide(pixels, 255.0, dtype=np.float32)
        normalised -= mean
        normalised /= std
        return normalised

    def batch(self, sources: Sequence[ImageSource], *, size: int) -> FloatArray:
        """Pictures -> (N, 3, size, size) float32. Raises ImageError for the first unreadable one."""
        if not sources:
            return np.empty((0, 3, size, size), dtype=np.float32)
        return np.stack([self(source, size=size) for source in sources])


def open_image(source: ImageSource, *, draft_size: int = 0) -> Image.Image:
    """A picture as upright 8-bit RGB: path, encoded bytes, or PIL image (first frame of an animation).

    With `draft_size` > 0, JPEGs may come back smaller, but never below that many pixels a side. That goes for
    a PIL image too while its file is open and not decoded (and leaves it as it was); pixels that the caller
    has decoded are taken as they are, so that a large JPEG then embeds slightly differently.
    Raises ImageError with a short reason when it is no picture, damaged, or too large; NotDecodedError when it is
    missing, or there is no memory or no decoder for it.
    """
    where = "picture" if isinstance(source, bytes | Image.Image) else os.fspath(source)
    try:
        if draft_size and isinstance(source, JpegImageFile):
            source = _encoded(source)
        if isinstance(source, Image.Image):
            return _to_rgb(_upright(_with_pixels(source)))
        with _file_of(source) as file, _opened(file, name=where) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            _check_work(image, file)
            if draft_size:
                image.draft("RGB", (draft_size, draft_size))
            with _unwarned() if _would_warn(image) else nullcontext():
                image.load()
            return _to_rgb(_upright(_with_pixels(image)))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise _image_error(error, source, where=where) from error


class _Guarded:
    """A picture's file for Pillow, which reads every part of it, however small, on its own, and in Python."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_READS

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        # Segments of EXIF are joined one by one, and all of it is copied each time.
        self._left -= MAX_READS // 100 if data.startswith(b"Exif\0\0") else 1
        if self._left < 0:
            raise ValueError("too many parts")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _file_of(source: str | os.PathLike[str] | bytes) -> Iterator[BinaryIO]:
    if not isinstance(source, bytes):
        mode = Path(source).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise _SpecialFileError  # opening a pipe would wait for ever
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if file.seek(0, os.SEEK_END) > MAX_FILE_BYTES:
            raise _TooLargeError
        file.seek(0)
        yield file


class _TooLargeError(Exception):
    pass


class _SpecialFileError(Exception):
    pass


class _CameraRawError(UnidentifiedImageError):
    pass


def _opened(file: BinaryIO, *, name: str) -> Image.Image:
    """The file with its header read, as Image.open does, but for its warning of large pictures, and no camera raw.

    The caller has its own limit. To suppress the warning, threads would wait for each other's files.
    """
    is_raw = name.lower().endswith(RAW_SUFFIXES)
    guarded = cast(BinaryIO, _Guarded(file))
    beginning = guarded.read(16)
    for format_ in FORMATS:
        make, accepts = Image.OPEN[format_]
        accepted = accepts is None or accepts(beginning)
        if accepted and not isinstance(accepted, str):  # a text says that this Pillow lacks the format
            guarded.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # to Image.open, too, it is another format
                image = make(guarded, "")
                if isinstance(image, TiffImageFile) and (is_raw or _DNG_VERSION in image.tag_v2):
                    raise _CameraRawError  # what Pillow reads of most of them is a small preview
                return image
    raise _CameraRawError if is_raw else UnidentifiedImageError


def _would_warn(image: Image.Image) -> bool:
    """Whether decoding warns of large pictures once more."""
    limit = Image.MAX_IMAGE_PIXELS
    return isinstance(image, TiffImageFile) and limit is not None and image.width * image.height > limit


@contextmanager
def _unwarned() -> Iterator[None]:
    # Filters of warnings are the process's: one thread at a time changes them and puts them back.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check_work(image: Image.Image, file: BinaryIO) -> None:
    """Refuses the few structures that let a small file take long: the others are bounded by its bytes and pixels."""
    if image.format in {"JPEG", "MPO"} and "progressive" in image.info:
        # Each scan goes over all pixels.
        place = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(place)
        if scans * image.width * image.height > MAX_SCANNED_PIXELS:
            raise ValueError(f"{scans} scans")
    elif isinstance(image, TiffImageFile) and image.info.get("compression") == "jpeg":
        # Strips or tiles that share their bytes are decoded once each, with up to a hundred scans.
        counts = image.tag_v2.get(279) or image.tag_v2.get(325) or ()
        if sum(counts) > file.seek(0, os.SEEK_END):
            raise ValueError("strips overlap")


class Header(NamedTuple):
    """What the beginning of a file says of its picture."""

    width: int
    height: int
    memory: int  # bytes, at most, that decoding takes beside the file itself


def read_header(file: BinaryIO, *, path: str | os.PathLike[str]) -> Header | None:
    """The header of the open `file`, nothing decoded (WebP and AVIF are read whole); None when it is damaged.

    Leaves the file at its beginning. Raises ImageError, naming `path`, when it is no picture in a supported format, and
    NotDecodedError when this Pillow lacks one of the formats.
    """
    try:
        image = _opened(file, name=os.fspath(path))
    except UnidentifiedImageError as error:
        raise _image_error(error, path, where=os.fspath(path)) from error
    except Exception:  # the decoder will say what is wrong with it
        return None
    finally:
        file.seek(0)
    each = _BYTES_PER_PIXEL.get(image.format or "", 8)
    return Header(image.width, image.height, each * min(image.width * image.height, MAX_PIXELS))


def _encoded(image: JpegImageFile) -> bytes | JpegImageFile:
    """The file behind a JPEG that is not decoded yet; the image itself where its pixels or size were chosen."""
    if not image.tile or image.decoderconfig or image.tell() or image.fp is None:
        return image
    image.fp.seek(0)
    return image.fp.read()  # decoding seeks to where it begins


def _image_error(error: Exception, source: ImageSource, *, where: str) -> ImageError:
    kind = NotDecodedError if _may_pass(error) else ImageError
    return kind(what=_reason(error, source), where=where, fix=_FIX)


def _may_pass(error: Exception) -> bool:
    """Whether the reason lies outside of the picture."""
    if isinstance(error, UnidentifiedImageError):  # also where Pillow was built without a format
        return not all(map(features.check, _CODECS))
    if isinstance(error, OSError):  # of what is in a file, Pillow raises those without a number
        return error.errno is not None or "not available" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError | ImportError)


def _reason(error: Exception, source: ImageSource) -> str:
    if isinstance(source, Absent):
        return source.reason
    if isinstance(error, _CameraRawError):
        return "is a camera raw picture, which needs converting to JPEG first"
    if isinstance(error, UnidentifiedImageError) and _is_heic(source):
        return "is a HEIC picture, which needs converting to JPEG first"
    known: dict[type[Exception], str] = {
        MemoryError: "there was not enough memory to decode it",
        FileNotFoundError: "no such file",
        IsADirectoryError: "is a folder, not a picture",
        PermissionError: "may not be read",
        UnidentifiedImageError: "not a picture in a supported format",
        _SpecialFileError: "is a pipe, a socket or a device, not a picture",
        _TooLargeError: TOO_LARGE,
        Image.DecompressionBombError: f"has more than {MAX_PIXELS // 10**6} megapixels",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    return f"damaged picture ({str(error) or type(error).__name__})"


def _is_heic(source: ImageSource) -> bool:
    """Whether a picture that Pillow cannot open is named or begins as a HEIC file does."""
    if isinstance(source, Image.Image):
        return False
    if not isinstance(source, bytes):
        if os.fspath(source).lower().endswith((".heic", ".heif")):
            return True
        try:
            with open(source, "rb") as file:  # noqa: PTH123 (a text is a path, too)
                source = file.read(12)
        except OSError:
            return False
    return source[4:8] == b"ftyp" and source[8:12] in _HEIC_BRANDS


def resize_centre_square(image: Image.Image, size: int) -> Image.Image:
    """The centre square as timm's Resize(short side) + CenterCrop would cut it, in one antialiased pass."""
    width, height = image.size
    # Reproduces torchvision's integer sizes and crop offset, without resizing what is cropped away.
    if width <= height:
        new_width, new_height = size, max(size, int(size * height / width))
    else:
        new_width, new_height = max(size, int(size * width / height)), size
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    box = (
        left * width / new_width,
        top * height / new_height,
        (left + size) * width / new_width,
        (top + size) * height / new_height,
    )
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _with_pixels(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("no pixels")
    return image


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata, which cameras and editors do write, leave the pixels readable
        return image
    # ImageOps.exif_transpose would write the rest of the EXIF block anew, and fail on odd tags.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    convert: Callable[[Image.Image], Image.Image]
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and wider: convert() would clip to white
        convert = partial(_scaled, white=_white(image))
    elif "A" in image.getbands() or "transparency" in image.info:
        convert = _on_white
    else:
        return image.convert("RGB")  # a copy, so that closing the file or changing the source cannot reach it
    rgb = Image.new("RGB", image.size)
    for box in _tiles(image):  # the whole picture in float64, or several times in RGBA, takes gigabytes
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _tiles(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, image.height, _TILE):
        for left in range(0, image.width, _TILE):
            yield left, top, min(left + _TILE, image.width), min(top + _TILE, image.height)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")  # transparent product pictures are meant on white
    return Image.alpha_composite(white, image).convert("RGB")


def _scaled(image: Image.Image, *, white: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=white, neginf=0.0)
    scaled = np.clip(values * (255.0 / white), 0, 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _white(image: Image.Image) -> float:
    """The value that means white: known for 16-bit files, the next usual one for 32-bit and float files."""
    if image.mode.startswith("I;16"):
        return 65535.0
    peak = max(_peak(np.asarray(image.crop(box), dtype=np.float64)) for box in _tiles(image))
    if peak == -np.inf:
        raise ValueError("no pixel has a finite value")
    if image.mode == "F" and peak <= 1:
        return 1.0
    return 255.0 if peak <= 255 else 65535.0


def _peak(values: npt.NDArray[np.float64]) -> float:
    return float(values.max(initial=-np.inf, where=np.isfinite(values)))
