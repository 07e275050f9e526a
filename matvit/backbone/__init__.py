"""Which timm models can be made elastic, and how one is described and built again: one file per family."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from matvit.backbone import eva, vit
from matvit.backbone.config import TimmBlock, TimmViT, ViTConfig, refusal

__all__ = ["TimmBlock", "TimmViT", "ViTConfig", "build", "describe", "plain_arguments"]


def describe(model: Any) -> ViTConfig:
    """The config of a timm model, its classifier left out. Raises BackboneError when it cannot be made elastic."""
    if type(model) is VisionTransformer:
        return vit.describe(model)
    if type(model) is Eva:
        return eva.describe(model)
    raise refusal(f"{type(model).__name__} is neither a plain timm VisionTransformer nor an Eva")


def build(config: ViTConfig, state: dict[str, Tensor]) -> TimmViT:
    """A timm module of this config that holds `state`'s tensors (not copies), in eval mode.

    Raises BackboneError when names or shapes do not match.
    """
    return eva.build(config, state) if config.family == "eva" else vit.build(config, state)


def plain_arguments(config: ViTConfig) -> dict[str, Any] | None:
    """Keyword arguments, in JSON types, with which timm's class alone builds such a module; None: none can say it."""
    return None if config.family == "eva" else vit.plain_arguments(config)
