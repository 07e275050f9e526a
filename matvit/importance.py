"""Importance ordering: the hidden units, heads and blocks that a small submodel keeps matter most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from matvit import feed_forward
from matvit.block import layer_scale

if TYPE_CHECKING:
    from matvit.model import MatViT

_BATCH, _WATCHED = 256, 128  # pictures that are embedded together, and that are while inputs of layers are watched


def order_by_importance(model: MatViT, images: torch.Tensor) -> None:
    """Reorder every block's hidden units, and its heads if they are an axis, in place, the most important first.

    Importance of a channel: root of its activation's summed squares on `images` (B, 3, R, R), times the norm
    of its outgoing weights, layer scale included; of a head: over its channels, squared and added.
    Rounding apart, the full encoder's function stays the same.
    """
    with torch.no_grad():
        squares = _summed_squares(model, images, [block.mlp.fc2 for block in model.vit.blocks])
        for block, square in zip(model.vit.blocks, squares, strict=True):
            importance = square.sqrt() * _outgoing_norm(block.mlp.fc2, layer_scale(block, 2))
            feed_forward.permute(block.mlp, torch.argsort(importance, descending=True, stable=True))
        if not model.axes.heads:
            return
        squares = _summed_squares(model, images, [block.attn.proj for block in model.vit.blocks])
        for block, square in zip(model.vit.blocks, squares, strict=True):
            importance = square * _outgoing_norm(block.attn.proj, layer_scale(block, 1)).square()
            by_head = importance.view(block.attn.num_heads, block.attn.head_dim).sum(dim=1)
            _permute_heads(block.attn, torch.argsort(by_head, descending=True, stable=True))


def _outgoing_norm(outgoing: nn.Linear, scale: torch.Tensor | None) -> torch.Tensor:
    scaled = outgoing.weight
    if scale is not None:
        scaled = scaled * scale[:, None]
    norm: torch.Tensor = torch.linalg.vector_norm(scaled, dim=0)
    return norm


def _permute_heads(attention: Attention, order: torch.Tensor) -> None:
    width, count = attention.head_dim, attention.num_heads
    channels = torch.arange(count * width, device=order.device).view(count, width)[order].flatten()
    stacked = torch.cat([part * count * width + channels for part in range(3)])  # query, key, value
    attention.qkv.weight.copy_(attention.qkv.weight[stacked])
    if attention.qkv.bias is not None:
        attention.qkv.bias.copy_(attention.qkv.bias[stacked])
    attention.proj.weight.copy_(attention.proj.weight[:, channels])


@torch.no_grad()
def find_keep_order(model: MatViT, images: torch.Tensor) -> tuple[int, ...]:
    """Block indices, the most important first, found greedily on `images` (B, 3, R, R) of native resolution.

    Starting from all blocks, the one goes whose absence moves the embeddings least (by their cosine to
    the full encoder's, both centred by the full encoder's mean), until one is left.
    """
    wanted = torch.cat([model(part) for part in torch.split(images, _BATCH)])
    mean = wanted.mean(dim=0)
    kept, dropped = list(range(model.shape.num_blocks)), list[int]()

    def agreement_without(block: int) -> float:
        widths = {one: model.shape.ffn_widths[one] for one in kept if one != block}
        found = torch.cat(
            [model.through(part, widths, heads=model.shape.num_heads) for part in torch.split(images, _BATCH)]
        )
        return F.cosine_similarity(F.normalize(found, dim=-1) - mean, wanted - mean, dim=-1).mean().item()

    while len(kept) > 1:
        least = max(kept, key=agreement_without)
        kept.remove(least)
        dropped.append(least)
    return tuple(kept + dropped[::-1])


@torch.no_grad()
def _summed_squares(model: MatViT, images: torch.Tensor, layers: list[nn.Linear]) -> list[torch.Tensor]:
    """The summed squares of each layer's inputs, by channel."""
    totals: list[torch.Tensor] = [torch.zeros((), device=images.device)] * len(layers)

    def add(index: int, inputs: torch.Tensor) -> None:
        totals[index] = totals[index] + inputs.float().square().sum(dim=(0, 1))

    watch_inputs(model, images, layers, add, batch_size=_WATCHED)
    return totals


def watch_inputs(
    model: MatViT,
    images: torch.Tensor,
    layers: Sequence[nn.Module],
    take: Callable[[int, torch.Tensor], None],
    *,
    batch_size: int,
) -> None:
    """Run the full encoder on `images` (B, 3, R, R); `take` is given each layer's position and its inputs."""

    def hook(index: int) -> RemovableHandle:
        handle: RemovableHandle = layers[index].register_forward_pre_hook(lambda _, inputs: take(index, inputs[0]))
        return handle

    handles = [hook(index) for index in range(len(layers))]
    try:
        for batch in torch.split(images, batch_size):
            model.vit(batch)
    finally:
        for handle in handles:
            handle.remove()
