"""The resolution axis: patches and positions for pictures of any size that is a multiple of the patch.

Letters: B batch, N tokens, D embedding, G patches a side.
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from matvit.backbone import TimmViT, ViTConfig


def embed(vit: TimmViT, config: ViTConfig, images: Tensor) -> Tensor:
    """Square pictures (B, 3, R, R) -> (B, N, D): patches with class token, registers and positions.

    As timm's `_pos_embed`, for every R that is a multiple of the patch.
    """
    patches = vit.patch_embed.proj(images)  # (B, D, G, G)
    grid = patches.shape[-1]
    tokens = patches.flatten(2).transpose(1, 2)
    prefix = [part.expand(len(tokens), -1, -1) for part in (vit.cls_token, vit.reg_token) if part is not None]
    if config.pos_embed == "none":
        return torch.cat([*prefix, tokens], dim=1)
    if config.no_embed_class:
        return torch.cat([*prefix, tokens + table(vit, config, grid)], dim=1)
    return torch.cat([*prefix, tokens], dim=1) + table(vit, config, grid)


def table(vit: TimmViT, config: ViTConfig, grid: int) -> Tensor:
    """The position table for `grid` x `grid` patches: the native one, or resampled from it as timm does."""
    native: Tensor = vit.pos_embed  # (1, N, D)
    if grid == config.image_size // config.patch_size:
        return native
    prefix = 0 if config.no_embed_class else vit.num_prefix_tokens
    resampled: Tensor = resample_abs_pos_embed(native, [grid, grid], num_prefix_tokens=prefix)
    return resampled


def rotary(vit: TimmViT, config: ViTConfig, images: Tensor) -> Tensor | None:
    """Rotary positions (G x G, 2 x width of a head) of pictures (B, 3, R, R); None for a backbone without."""
    if config.rope_temperature is None:
        return None
    shape = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    cached = shape == tuple(vit.rope.feat_shape)
    positions: Tensor = vit.rope.get_embed(None if cached else shape)
    return positions
