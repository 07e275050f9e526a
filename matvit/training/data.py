"""Training pictures on the device: decoded once; cropped and augmented there, by `matvit.training.crops`.

A picture is kept as a square of 8-bit pixels together with its true aspect ratio, so that random
crops are drawn in the picture's own geometry and nothing at its sides is lost.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from matvit.datasets import LabelledImages, SkippedPicture
from matvit.errors import DatasetError, ImageError
from matvit.preprocess import FloatArray, open_image
from matvit.progress import Progress, ProgressEvent
from matvit.threads import usable_cores
from matvit.training.memory import room_for


@dataclass(frozen=True, kw_only=True)
class DeviceImages:
    """N labelled pictures in device memory."""

    pixels: Tensor  # (N, 3, R, R) uint8, squeezed to a square
    aspect: Tensor  # (N,) float32, width / height
    labels: Tensor  # (N,) int64
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


def to_device(
    images: LabelledImages, *, resolution: int, device: torch.device, processes: int = 1, progress: Progress
) -> tuple[DeviceImages, LabelledImages, list[SkippedPicture]]:
    """Decode all pictures to `resolution` pixels a side: the readable ones, decoded and as given, and the others.

    `processes` share the cores, each decoding on its own. Raises DatasetError when none can be read.
    """
    room = partial(
        room_for,
        f"its {len(images)} pictures of {resolution} pixels a side do not fit into memory",
        where=images.name,
        fix="lower its resolution in the recipe",
        error=DatasetError,
    )
    with room():
        pixels = np.empty((len(images), 3, resolution, resolution), dtype=np.uint8)  # as on the device: copied once
    aspect = np.empty(len(images), dtype=np.float32)
    skipped = _decode_into(pixels, aspect, images, processes=processes, progress=progress)
    kept = images
    if skipped:
        readable = [index for index in range(len(images)) if index not in skipped]
        if not readable:
            what = f"none of its {len(images)} pictures can be read"
            raise DatasetError(what=what, where=images.name, fix="give pictures that can be opened")
        for index, row in enumerate(readable):  # in place: a copy would be as large
            pixels[index] = pixels[row]
        pixels, aspect, kept = pixels[: len(readable)], aspect[readable], _only(images, readable)
    with room():
        on_device = torch.from_numpy(pixels).to(device)
    decoded = DeviceImages(
        pixels=on_device,
        aspect=torch.from_numpy(aspect).to(device),
        labels=torch.from_numpy(kept.labels).to(device),
        num_classes=len(images.class_names),
    )
    return decoded, kept, [SkippedPicture(path=images.origins[index], reason=why) for index, why in skipped.items()]


def _decode_into(
    pixels: npt.NDArray[np.uint8], aspect: FloatArray, images: LabelledImages, *, processes: int, progress: Progress
) -> dict[int, str]:
    """Fill `pixels` (N, 3, R, R) and `aspect` (N,); the rows of the pictures that cannot be read, and why."""
    resolution = pixels.shape[-1]

    def decode(index: int) -> str | None:
        try:
            image = open_image(images.images[index], draft_size=2 * resolution)
        except ImageError as error:
            return error.what
        aspect[index] = image.width / image.height
        squeezed = np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))  # (R, R, 3)
        pixels[index] = squeezed.transpose(2, 0, 1)
        return None

    skipped: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, usable_cores() // processes)) as pool:
        for index, reason in enumerate(pool.map(decode, range(len(images)))):
            if reason is not None:
                skipped[index] = reason
            if (done := index + 1) % 1000 == 0 or done == len(images):
                note = f"{len(skipped)} skipped" if skipped else ""
                stage = f"decode {images.name}"
                progress(ProgressEvent(stage=stage, done=done, total=len(images), unit="pictures", note=note))
    return skipped


def _only(images: LabelledImages, rows: list[int]) -> LabelledImages:
    return replace(
        images,
        labels=images.labels[rows],
        images=[images.images[row] for row in rows],
        origins=[images.origins[row] for row in rows],
    )
