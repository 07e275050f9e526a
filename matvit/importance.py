"""Importance ordering: the hidden units and blocks that a small submodel keeps are the ones that matter most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from matvit.model import MatViT


def order_by_importance(model: MatViT, images: torch.Tensor) -> None:
    """Reorder every FFN's hidden units in place, the most important first; the full encoder is unchanged.

    Importance of a unit: root mean square of its activation on `images` (B, 3, H, W), times the norm
    of its outgoing weights, layer scale included. Rounding apart, XL's function stays the same.
    """
    squares = _mean_square_activations(model, images)
    with torch.no_grad():
        for block, square in zip(model.vit.blocks, squares, strict=True):
            outgoing = block.mlp.fc2.weight
            if isinstance(block.ls2, nn.Identity):
                norm = outgoing.norm(dim=0)
            else:
                norm = (outgoing * block.ls2.gamma[:, None]).norm(dim=0)
            order = torch.argsort(square.sqrt() * norm, descending=True, stable=True)
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            if block.mlp.fc1.bias is not None:
                block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            outgoing.copy_(outgoing[:, order])


@torch.no_grad()
def find_keep_order(model: MatViT, images: torch.Tensor, *, batch_size: int = 256) -> tuple[int, ...]:
    """Block indices, the most important first, found greedily on `images` (B, 3, R, R) of native resolution.

    Starting from all blocks, the one goes whose absence moves the embeddings least (by their cosine to
    the full encoder's, both centred by the full encoder's mean), until one is left.
    """
    wanted = model(images)
    mean = wanted.mean(dim=0)
    kept, dropped = list(range(model.shape.num_blocks)), list[int]()

    def agreement_without(block: int) -> float:
        widths = {one: model.shape.ffn_widths[one] for one in kept if one != block}
        found = torch.cat([model.through(part, widths) for part in torch.split(images, batch_size)])
        return F.cosine_similarity(F.normalize(found, dim=-1) - mean, wanted - mean, dim=-1).mean().item()

    while len(kept) > 1:
        least = max(kept, key=agreement_without)
        kept.remove(least)
        dropped.append(least)
    return tuple(kept + dropped[::-1])


@torch.no_grad()
def _mean_square_activations(model: MatViT, images: torch.Tensor, batch_size: int = 128) -> list[torch.Tensor]:
    totals: list[torch.Tensor] = [torch.zeros((), device=images.device)] * len(model.vit.blocks)

    def hook(index: int) -> RemovableHandle:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            totals[index] = totals[index] + inputs[0].float().square().sum(dim=(0, 1))  # (F,)

        handle: RemovableHandle = model.vit.blocks[index].mlp.fc2.register_forward_pre_hook(add)
        return handle

    handles = [hook(index) for index in range(len(model.vit.blocks))]
    try:
        for batch in torch.split(images, batch_size):
            model.vit(batch)
    finally:
        for handle in handles:
            handle.remove()
    return totals
