"""Extraction: copying slices of an elastic encoder into a plain, really smaller timm module."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from matvit.spec import SubmodelSpec

if TYPE_CHECKING:
    from matvit.model import MatViT


def extract(model: MatViT, spec: SubmodelSpec) -> VisionTransformer:
    """A stand-alone timm module with copied weights, on the same device and dtype, in eval mode.

    Law: normalize(extract(model, spec)(images)) == model(images, spec).
    """
    # deepcopy takes a replacement for every object that it meets in the memo: the full-width
    # layers are never copied, only their slices.
    memo: dict[int, object] = {}
    for block, width in zip(model.vit.blocks, spec.widths, strict=True):
        memo[id(block.mlp.fc1)] = _narrow(block.mlp.fc1, rows=width)
        memo[id(block.mlp.fc2)] = _narrow(block.mlp.fc2, columns=width)
    vit: VisionTransformer = copy.deepcopy(model.vit, memo)
    return vit.eval()


def _narrow(linear: nn.Linear, *, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    weight = linear.weight.detach()[:rows, :columns].clone()
    narrow = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    narrow.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        narrow.bias = nn.Parameter(linear.bias.detach()[:rows].clone(), requires_grad=linear.bias.requires_grad)
    return narrow
