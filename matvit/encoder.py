"""What the rest of the product knows of an encoder: two small protocols, no torch, and what embeddings must be.

A torch module, an OpenVINO session and a remote service are interchangeable behind `ImageEncoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from matvit.errors import CheckpointError
from matvit.preprocess import FloatArray, ImageSource, PixelArray, Preprocessing
from matvit.spec import EncoderShape, SubmodelSpec


class BatchEncoder(Protocol):
    """An encoder whose `encode` takes none of this host's cores, for many batches that processes decode meanwhile."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What they do."""

    def encode(self, pixels: PixelArray) -> FloatArray:
        """(N, 3, H, W) uint8, as `Preprocessing.pixels` gives them -> (N, D) float32 of unit length."""


class ImageEncoder(Protocol):
    """One encoder of one fixed spec, ready to embed pictures. N pictures, D embedding width.

    Its class may have a method `for_batches`, as `TorchEncoder` does: a `BatchEncoder` of the same, or None.
    """

    @property
    def spec(self) -> SubmodelSpec:
        """The submodel that this encoder computes."""

    @property
    def space_id(self) -> str:
        """Identity of the embedding space; embeddings compare only where it is equal."""

    @property
    def runtime(self) -> str:
        """Name of what computes it, for example "torch-cpu"."""

    @property
    def embedding_dim(self) -> int:
        """D."""

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        """Pictures -> (N, 3, H, W) float32. Raises ImageError for the first unreadable one."""

    def encode(self, pixels: FloatArray) -> FloatArray:
        """(N, 3, H, W) float32 -> (N, D) float32 of unit length."""

    def embed(self, images: Sequence[ImageSource]) -> FloatArray:
        """`encode(preprocess(images))`: pictures -> (N, D) float32 of unit length."""


class ElasticEncoder(Protocol):
    """An encoder from which submodels of one embedding space are cut; `MatViT` is one."""

    @property
    def name(self) -> str:
        """Short human name, for messages."""

    @property
    def source(self) -> str | None:
        """What `from_pretrained` found it by (name, absolute folder, hub id); None if never saved."""

    @property
    def revision(self) -> str | None:
        """Commit of the hub repository that it came from; None for anything else."""

    @property
    def space_id(self) -> str:
        """Identity of the embedding space that all its submodels share."""

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the weight file that it came from; None if never saved."""

    @property
    def embedding_dim(self) -> int:
        """D."""

    @property
    def pareto(self) -> Sequence[Mapping[str, Any]]:
        """The checkpoint's table: a row for each submodel that was measured, with spec, relative_flops and quality."""

    @property
    def shape(self) -> EncoderShape:
        """The full encoder's sizes and axes; parses specs."""

    def encoder(self, spec: str | SubmodelSpec | None = None) -> ImageEncoder:
        """The submodel `spec` (None: full) with preprocessing, ready to embed pictures."""


def is_unit(embeddings: FloatArray) -> npt.NDArray[np.bool_]:
    """(N, D) -> (N,) bool: whether each row is finite and of unit length (to 1e-3, room for 16-bit runtimes)."""
    return near_one(lengths(embeddings))


def near_one(lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of these are unit lengths, as `is_unit` sees them."""
    near: npt.NDArray[np.bool_] = np.abs(lengths - 1.0) < 1e-3  # False for NaN
    return near


def lengths(embeddings: FloatArray) -> npt.NDArray[np.float64]:
    """(N, D) -> (N,) as numpy's norm gives them, which takes longer for one of them than all the rest of a search."""
    wide = embeddings.astype(np.float64)
    found: npt.NDArray[np.float64] = np.sqrt(np.add.reduce(wide * wide, axis=-1))
    return found


def check_unit(embeddings: FloatArray, spec: SubmodelSpec) -> None:
    """Raises CheckpointError unless all that `spec` gave are embeddings: finite weights may overflow, or give zeros."""
    if not is_unit(embeddings).all():
        raise CheckpointError(
            what="gives embeddings that are not finite or not of unit length",
            where=f"submodel '{spec}'",
            fix="use another checkpoint, or other weights",
        )
