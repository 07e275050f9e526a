"""Adapting the small encoders to a person's own pictures, without labels: XL, and so every index, stays as it is.

Only private parameters are trained, towards XL's embeddings of the same crops.
N pictures, B of a batch, D embedding, R pixels a side.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from matvit import quantization
from matvit.errors import DatasetError, ImageError
from matvit.metrics import agreement, top_k
from matvit.model import MatViT
from matvit.preprocess import FloatArray, ImageSource, open_image
from matvit.private import OWNERS, PrivateConfig
from matvit.progress import Progress, ProgressEvent, silent
from matvit.training import losses
from matvit.training.data import colour_jitter, cut, random_crops
from matvit.training.recipe import Augmentation
from matvit.training.sampling import MIXED, ladder_spec

FEWEST_PICTURES = 40
_HELD_BACK = 5  # every fifth picture is only measured on
_BATCH = 32
_RANK = 16
_LEARNING_RATE = 1e-3
_LADDER = ("S", "M", MIXED, "S", "L")  # trained in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a submodel's answers differ from XL's in XL's index of the same pictures: means over queries, 0 to 1."""

    cosine: float  # of its embedding with XL's, both centred by XL's mean
    first: float  # share of queries with XL's own first hit
    agreement_at_10: float  # share of XL's first 10 hits that it finds


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What was gained on pictures that were held back, and what was kept."""

    pictures: int  # trained on
    held_back: int
    skipped: tuple[tuple[str, str], ...]  # pictures that cannot be read, and why
    steps: int
    before: Mapping[str, Agreement]
    after: Mapping[str, Agreement]
    kept: tuple[str, ...]  # granularities that gained; the others own what they owned before


def read_pictures(
    model: MatViT, images: Sequence[ImageSource], *, fewest: int = FEWEST_PICTURES
) -> tuple[FloatArray, Tensor, tuple[tuple[str, str], ...]]:
    """As the encoder takes them (N, 3, R, R), for crops (N, 3, R, R) uint8, and those that cannot be read.

    Raises DatasetError when fewer than `fewest` can be read.
    """
    size = model.shape.image_size
    ready, squares, skipped = [], [], []
    for image in images:
        try:
            ready.append(model.preprocessing(image, size=size))
            square = open_image(image).resize((size, size), Image.Resampling.BILINEAR)
            squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        except ImageError as error:
            skipped.append((str(image), error.what))
    if len(ready) < fewest:
        raise DatasetError(
            what=f"{len(ready)} of {len(images)} pictures can be read, and {fewest} are needed",
            where="pictures",
            fix="give a folder with more of them, a few hundred at best",
        )
    return np.stack(ready), torch.stack(squares), tuple(skipped)


@torch.inference_mode()
def agreement_with_full(
    model: MatViT, pixels: FloatArray, queries: Sequence[int], *, specs: Sequence[str] = OWNERS
) -> dict[str, Agreement]:
    """Each spec's answers beside XL's: the pictures at `queries` search XL's embeddings of all others.

    `pixels` (N, 3, R, R), normalised, of native resolution.
    """
    gallery = _embed(model, pixels, "XL")
    own = np.asarray(queries, dtype=np.int64)
    wanted, mean = top_k(gallery[own], gallery, 10, exclude=own[:, None])[1], gallery.mean(axis=0)
    found: dict[str, Agreement] = {}
    for spec in specs:
        vectors = _embed(model, pixels[own], spec)
        hits = top_k(vectors, gallery, 10, exclude=own[:, None])[1]
        centred, target = vectors - mean, gallery[own] - mean
        norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(target, axis=1)
        found[str(spec)] = Agreement(
            cosine=float(((centred * target).sum(axis=1) / np.maximum(norms, 1e-12)).mean()),
            first=float((hits[:, 0] == wanted[:, 0]).mean()),
            agreement_at_10=float(agreement(hits, wanted).mean()),
        )
    return found


def adapt(
    model: MatViT, images: Sequence[ImageSource], *, minutes: float, seed: int = 0, progress: Progress = silent
) -> Adaptation:
    """Train what S, M and L own for so many minutes; a granularity that agrees no better afterwards keeps the old.

    Every fifth picture is held back, to measure on. XL and `space_id` stay to the bit. Raises DatasetError for
    too few pictures.
    """
    pixels, squares, skipped = read_pictures(model, images)
    held_back = list(range(0, len(pixels), _HELD_BACK))
    rows = torch.tensor([row for row in range(len(pixels)) if row % _HELD_BACK])
    before = agreement_with_full(model, pixels, held_back)
    if model.private is None:
        model.add_private(PrivateConfig(rank=_RANK))
    assert model.private is not None
    old = {name: tensor.clone() for name, tensor in model.private.state_dict().items()}
    steps = _train(model, squares[rows], minutes=minutes, seed=seed, progress=progress)
    _round(model)
    after = agreement_with_full(model, pixels, held_back)
    kept = tuple(name for name in before if after[name].agreement_at_10 > before[name].agreement_at_10)
    state = model.private.state_dict()
    gained = tuple(f"blocks.{name}." for name in kept)
    model.private.load_state_dict({name: state[name] if name.startswith(gained) else old[name] for name in state})
    return Adaptation(
        pictures=len(rows),
        held_back=len(held_back),
        skipped=skipped,
        steps=steps,
        before=before,
        after=after,
        kept=kept,
    )


def _train(model: MatViT, squares: Tensor, *, minutes: float, seed: int, progress: Progress) -> int:
    assert model.private is not None
    model.vit.requires_grad_(False)
    optimiser = torch.optim.AdamW(model.private.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)  # noqa: S311  # a seed, not a secret
    began, seconds, steps = time.monotonic(), 60 * minutes, 0
    while (passed := time.monotonic() - began) < seconds:
        warm = min(1.0, (steps + 1) / 10)
        optimiser.param_groups[0]["lr"] = _LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * passed / seconds))
        crops = _crops(model, squares, generator)
        spec = ladder_spec(model.shape, _LADDER[steps % len(_LADDER)], rng)
        with torch.no_grad():
            anchors = model(crops)
        embeddings = model(crops, spec)
        loss = losses.cosine(embeddings, anchors) + 2 * losses.similarity(embeddings, anchors)
        optimiser.zero_grad()
        torch.autograd.backward(loss + 0.5 * losses.contrast(embeddings, anchors))
        torch.nn.utils.clip_grad_norm_(model.private.parameters(), 3.0)
        optimiser.step()
        steps += 1
        note = f"step {steps}, loss {loss.item():.3f}"
        done = min(int(time.monotonic() - began), int(seconds))
        progress(ProgressEvent(stage="adapt", done=done, total=int(seconds), unit="seconds", note=note))
    model.vit.requires_grad_(True)
    return steps


def _crops(model: MatViT, squares: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, R, R), augmented and normalised."""
    rows = torch.randperm(len(squares), generator=generator)[:_BATCH]
    augmentation, size = Augmentation(), model.shape.image_size
    boxes = random_crops(torch.ones(len(rows)), augmentation, generator)
    images = colour_jitter(cut(squares[rows], boxes, size), augmentation, generator)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (model.preprocessing.mean, model.preprocessing.std))
    return (images - mean) / std


def _round(model: MatViT) -> None:
    """To what int8 storage keeps, so that what is measured is what may be saved."""
    assert model.private is not None
    state = {name: tensor.numpy() for name, tensor in model.private.state_dict().items()}
    rounded = quantization.dequantize(quantization.quantize(state))
    model.private.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in rounded.items()})


def _embed(model: MatViT, pixels: FloatArray, spec: str) -> FloatArray:
    encoder = model.encoder(spec)
    return np.concatenate([encoder.encode(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)])
