"""Extraction: copying slices of an elastic encoder into a plain, really smaller timm module."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from matvit import feed_forward, positions
from matvit.backbone import TimmViT
from matvit.heads import cut_heads
from matvit.preprocess import Preprocessing
from matvit.spec import SubmodelSpec

if TYPE_CHECKING:
    from matvit.model import MatViT


def extract(model: MatViT, spec: SubmodelSpec) -> TimmViT:
    """A stand-alone timm module with copied weights, on the same device and dtype, in eval mode.

    Law: normalize(extract(model, spec)(images)) == model(images, spec). `timm.data.resolve_model_data_config` gives
    how pictures are prepared for it.
    """
    # deepcopy takes a replacement for every object that it meets in the memo: the full-width
    # layers are never copied, only their slices.
    memo: dict[int, object] = {}
    with torch.no_grad():
        kept = [model.block_of(index, spec.widths[index]) for index in spec.kept_blocks]
    for block, index in zip(kept, spec.kept_blocks, strict=True):
        width = spec.widths[index]
        memo[id(block.attn)] = cut_heads(block.attn, spec.heads)
        memo |= feed_forward.slices(block.mlp, width)
    copies = [copy.deepcopy(block, memo) for block in kept]
    in_sequence = isinstance(model.vit.blocks, nn.Sequential)
    memo[id(model.vit.blocks)] = nn.Sequential(*copies) if in_sequence else nn.ModuleList(copies)
    vit: TimmViT = copy.deepcopy(model.vit, memo)
    _set_resolution(vit, model, spec.image_size)
    vit.feature_info = vit.feature_info[: spec.depth]
    say_how_to_prepare(vit, model.preprocessing, image_size=spec.image_size)
    return vit.eval()


def say_how_to_prepare(vit: TimmViT, preprocessing: Preprocessing, *, image_size: int) -> None:
    """Pictures, where `timm.data` asks a model for it."""
    vit.pretrained_cfg = vit.default_cfg = {
        "input_size": (3, image_size, image_size),
        "fixed_input_size": True,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": 0,
    }


def _set_resolution(vit: TimmViT, model: MatViT, image_size: int) -> None:
    if image_size == model.config.image_size:
        return
    vit.patch_embed.set_input_size(img_size=(image_size, image_size))
    if vit.pos_embed is not None:
        table = positions.table(vit, model.config, image_size // model.config.patch_size).detach()
        vit.pos_embed = nn.Parameter(table.clone(), requires_grad=vit.pos_embed.requires_grad)
    if model.config.rope_temperature is not None:
        vit.rope.update_feat_shape(vit.patch_embed.grid_size)
