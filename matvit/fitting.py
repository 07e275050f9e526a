"""A closed-form start for private parameters: the hidden units that are kept make up for those that are not.

Letters in shape comments: B batch, T tokens in all, D embedding, F hidden units, w hidden units kept, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matvit.importance import watch_inputs
from matvit.model import MatViT
from matvit.private import OWNERS

_RIDGE = 1e-3  # of the kept units' mean variance
_BATCH = 64  # pictures


@torch.no_grad()
def fit_private(model: MatViT, images: Tensor) -> None:
    """Start what S, M and L own of each fc2 from the least-squares fit of its kept columns to the full feed-forward.

    Its hidden units are those of XL on `images` (B, 3, R, R). Of the best change of fc2, the rank's worth that moves
    the output most is kept. For a truncated encoder: trained submodels follow XL by ways of their own, and lose.
    """
    assert model.private is not None
    rank = model.private.config.rank
    assert rank is not None
    layers = [block.mlp.fc2 for block in model.vit.blocks]
    for index, (layer, units) in enumerate(zip(layers, _hidden_units(model, images, layers), strict=True)):
        for owner in OWNERS:
            own = model.private.block(owner, index)
            up, down, offset = _best_change(layer.weight.double(), *units, width=own.width, rank=rank)
            own.set_matrix("mlp.fc2.weight", up=up, down=down)
            if layer.bias is not None:
                own.add("mlp.fc2.bias", offset)


def _hidden_units(model: MatViT, images: Tensor, layers: list[nn.Linear]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer's inputs, in float64: mean (F,) and covariance (F, F); about 0 where there is no bias to shift."""
    sums = [torch.zeros(one.in_features, device=images.device, dtype=torch.float64) for one in layers]
    products = [one.new_zeros(len(one), len(one)) for one in sums]
    count = 0

    def add(index: int, inputs: Tensor) -> None:
        nonlocal count
        units = inputs.flatten(0, 1).float()  # (T, F)
        sums[index] += units.sum(dim=0)
        products[index] += units.T @ units
        count += len(units) if index == 0 else 0

    watch_inputs(model, images, layers, add, batch_size=_BATCH)
    means = [total / count * (layer.bias is not None) for total, layer in zip(sums, layers, strict=True)]
    return [(mean, product / count - mean.outer(mean)) for mean, product in zip(means, products, strict=True)]


def _best_change(
    weight: Tensor, mean: Tensor, covariance: Tensor, *, width: int, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`up` (R, D) and `down` (R, w), whose product changes the first columns of `weight` (D, F), and the bias (D,).

    Reduced-rank regression, ridge-regularised: the fit, projected on the directions in which its output varies most.
    """
    cut = weight[:, width:]  # its output, cut @ hidden[w:], is what hidden[:w] is to give
    kept = covariance[:width, :width]
    ridge = _RIDGE * kept.diagonal().mean() * torch.eye(width, device=kept.device, dtype=kept.dtype)
    change = torch.linalg.solve(kept + ridge, covariance[:width, width:] @ cut.T).T  # (D, w)
    up = torch.linalg.eigh(change @ kept @ change.T).eigenvectors[:, -rank:].T  # (R, D)
    down = up @ change
    return up, down, cut @ mean[width:] - up.T @ (down @ mean[:width])
