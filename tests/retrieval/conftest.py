"""A tiny elastic encoder without torch, and folders of pictures that it can tell apart."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matvit.preprocess import FloatArray, ImageSource, Preprocessing
from matvit.spec import EncoderShape, SubmodelSpec
from retrieval.items import Item

SHAPE = EncoderShape(ffn_widths=(64, 64), num_heads=2, image_size=8)
PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DIM = 16
Failing = Callable[..., AbstractContextManager[None]]


@dataclass(frozen=True)
class FakeEncoder:
    """A fixed random projection of the pixels; the narrower the spec, the more noise."""

    spec: SubmodelSpec
    space_id: str
    runtime: str = "numpy"
    embedding_dim: int = DIM

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        return PREPROCESSING.batch(images, size=self.spec.image_size)

    def encode(self, pixels: FloatArray) -> FloatArray:
        random = np.random.default_rng(7)
        exact = random.standard_normal((pixels[0].size, DIM))
        noise = random.standard_normal((pixels[0].size, DIM))
        missing = 1 - sum(self.spec.widths) / sum(SHAPE.ffn_widths)
        flat = pixels.reshape(len(pixels), -1)
        embeddings = flat @ (exact + 0.3 * missing * noise) + 1e-3
        return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)

    def embed(self, images: Sequence[ImageSource]) -> FloatArray:
        return self.encode(self.preprocess(images))


@dataclass
class FakeElastic:
    name: str = "fake"
    source: str | None = "fake-source"
    revision: str | None = "fake-commit"
    space_id: str = "5" * 64
    weights_sha256: str | None = "6" * 64
    embedding_dim: int = DIM
    shape: EncoderShape = SHAPE
    pareto: tuple[dict[str, Any], ...] = ()
    extracted: int = 0

    def encoder(self, spec: str | SubmodelSpec | None = None) -> FakeEncoder:
        self.extracted += 1
        return FakeEncoder(self.shape.spec(spec), self.space_id)

    def in_another_space(self) -> FakeElastic:
        return replace(self, space_id="a" * 64)


def picture_bytes(seed: int, *, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def vector_of(number: int) -> FloatArray:
    """(DIM,) float32 of unit length, another one for every number."""
    vector = np.random.default_rng(number).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def item_of(number: int) -> Item:
    """A picture of this id in the folder "root", not written yet."""
    return Item(
        id=number,
        root="root",
        path=b"%d.png" % number,
        content_sha256=f"{number:064x}",
        size=1,
        mtime_ns=1,
        width=1,
        height=1,
        metadata=json.dumps({"shelf": number % 7, "label": "odd" if number % 2 else "even"}),
        status="ok",
        reason=None,
        row=None,
    )


@pytest.fixture
def elastic() -> FakeElastic:
    return FakeElastic()


@pytest.fixture
def picture() -> Callable[[int], bytes]:
    """picture(seed) -> PNG bytes, different for every seed."""
    return picture_bytes


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """`with failing("fsync", at=3)`: the fourth call of `os.fsync` fails as on a full disk (or with `code`)."""

    @contextmanager
    def fail(name: str, *, at: int, code: int = errno.ENOSPC) -> Iterator[None]:
        calls = itertools.count()
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == at:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            yield

    return fail


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, 0.png to 9.png, the last three in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(10):
        place = folder / "sub" if number >= 7 else folder
        (place / f"{number}.png").write_bytes(picture_bytes(number))
    return folder
