"""A tiny untrained checkpoint, a few pictures, and the command line as a function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from matvit import MatViT
from matvit_app.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str  # less the lines of progress
    progress: tuple[str, ...] = ()

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        lines = err.splitlines(keepends=True)
        told = tuple(line for line in lines if re.match(r"[a-z][\w ]*: \d+ (of \d+ )?[a-z]+(, .*)?\n$", line))
        return Outcome(code, out, "".join(line for line in lines if line not in told), told)

    return run_command


def tiny_encoder(seed: int, *, depth: int = 2) -> MatViT:
    torch.manual_seed(seed)
    vit = VisionTransformer(img_size=28, patch_size=14, embed_dim=32, depth=depth, num_heads=2, num_classes=0)
    return MatViT.from_timm(vit)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny_encoder(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another embedding space, and another depth."""
    folder = tmp_path_factory.mktemp("checkpoints") / "other"
    tiny_encoder(1, depth=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four pictures each, in class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        for number in range(4):
            pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory, photos: Path, checkpoint: Path) -> Path:
    """The photos indexed with the checkpoint; shared, so do not write to it."""
    path = tmp_path_factory.mktemp("indexes") / "photos.index"
    assert main(["index", str(photos), "--index", str(path), "--encoder", str(checkpoint)]) == 0
    return path
