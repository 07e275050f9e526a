"""Elastic vision transformers: one encoder, many sizes, one embedding space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matvit.errors import (
    BackboneError,
    CheckpointError,
    DatasetError,
    ImageError,
    MatVitError,
    MissingExtraError,
    NotDecodedError,
    RecipeError,
    SpecError,
)
from matvit.spec import EncoderShape, Granularity, SubmodelSpec

if TYPE_CHECKING:
    from matvit.model import MatViT

__all__ = [
    "BackboneError",
    "CheckpointError",
    "DatasetError",
    "EncoderShape",
    "Granularity",
    "ImageError",
    "MatViT",
    "MatVitError",
    "MissingExtraError",
    "NotDecodedError",
    "RecipeError",
    "SpecError",
    "SubmodelSpec",
]


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> object:
    """`MatViT` is imported on first use, so that `import matvit` works and stays fast without torch."""
    if name == "MatViT":
        try:
            from matvit.model import MatViT
        except ModuleNotFoundError as error:
            if error.name not in {"torch", "timm", "torchvision"}:
                raise
            raise MissingExtraError.for_extra("torch", purpose="MatViT") from error
        return MatViT
    raise AttributeError(f"module 'matvit' has no attribute '{name}'")
