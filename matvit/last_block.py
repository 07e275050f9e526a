"""A closed-form fit of what a granularity owns in the last block, so that its tokens come out as XL's do.

Two ridge regressions, each towards what is still missing to XL's output: of the attention's output matrix, then of
the feed-forward's second. Fitting earlier blocks as well, each to XL's tokens there, was tried and gained less.

Letters: T tokens, D embedding, F features that a matrix multiplies, K groups of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matvit import positions
from matvit.backbone import TimmBlock
from matvit.block import layer_scale, run_block
from matvit.encoder import check_unit
from matvit.model import MatViT
from matvit.preprocess import FloatArray
from matvit.spec import SubmodelSpec

PENALTIES = tuple(10.0**power for power in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2))
_GROUPS = 4  # of pictures, that the penalty is chosen by
_BATCH = 32
_PATCHES = 16  # of a picture, that are fitted where its embedding is no one token's


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What goes into the last block and comes out of it, for the chosen tokens of each picture."""

    incoming: Tensor  # (T, D)
    attended: Tensor  # (T, D), that the attention's output matrix multiplies
    outgoing: Tensor  # (T, D)
    picture: Tensor  # (T,), the number of the picture
    embeddings: FloatArray  # (N, D), of unit length, of all pictures

    def of(self, wanted: Tensor) -> Tokens:
        """Those of some tokens, `wanted` (T,) being true for them."""
        parts = (self.incoming[wanted], self.attended[wanted], self.outgoing[wanted], self.picture[wanted])
        incoming, attended, outgoing, picture = parts
        return replace(self, incoming=incoming, attended=attended, outgoing=outgoing, picture=picture)


@torch.no_grad()
def read_tokens(model: MatViT, pixels: FloatArray, spec: SubmodelSpec) -> Tokens:
    """Of pictures (N, 3, R, R) of native resolution, as the submodel `spec` computes them, of all blocks and heads."""
    *before, last = spec.kept_blocks
    block, width = model.block_of(last, spec.widths[last]), spec.widths[last]
    chosen = _chosen_tokens(model, len(pixels))  # (N, tokens of each)
    parts: list[list[Tensor]] = []
    embeddings: list[Tensor] = []
    for start in range(0, len(pixels), _BATCH):
        images = torch.from_numpy(pixels[start : start + _BATCH]).to(model.device)
        incoming = model.tokens(images, {index: spec.widths[index] for index in before}, heads=spec.heads)
        rope = positions.rotary(model.vit, model.config, images)

        def run(incoming: Tensor = incoming, rope: Tensor | None = rope) -> Tensor:
            return run_block(block, incoming, width, spec.heads, rope)

        attended, outgoing = _input_of(block.attn.proj, run)
        index = chosen[start : start + _BATCH, :, None].to(model.device)
        parts.append([one.take_along_dim(index, dim=1).flatten(0, 1) for one in (incoming, attended, outgoing)])
        embeddings.append(F.normalize(model.pooled(outgoing), dim=-1))
    found = torch.cat(embeddings).cpu().numpy()
    check_unit(found, spec)
    incoming, attended, outgoing = (torch.cat(part) for part in zip(*parts, strict=True))
    picture = torch.arange(len(pixels)).repeat_interleave(chosen.shape[1])
    return Tokens(
        incoming=incoming,
        attended=attended,
        outgoing=outgoing,
        picture=picture.to(model.device),
        embeddings=found,
    )


@torch.no_grad()
def fit_last_block(model: MatViT, block: TimmBlock, own: Tokens, wanted: Tensor) -> dict[str, Tensor]:
    """By name, what to add to the tensors of `block`, so that `own` comes out as `wanted` (T, D), which is XL's."""
    groups = own.picture % _GROUPS
    scales = [layer_scale(block, branch) for branch in (1, 2)]
    missing = _missing(model, own.outgoing, wanted)
    fit = _ridge(own.attended, missing, groups, offset=block.attn.proj.bias is not None)
    tokens = own.incoming + _scaled(block.attn.proj(own.attended), scales[0]) + fit.of(own.attended)
    changes = _as_changes("attn.proj", block.attn.proj, fit, scales[0])
    hidden, output = _input_of(block.mlp.fc2, lambda: block.mlp(block.norm2(tokens)))
    missing = _missing(model, tokens + _scaled(output, scales[1]), wanted)
    fit = _ridge(hidden, missing, groups, offset=block.mlp.fc2.bias is not None)
    return changes | _as_changes("mlp.fc2", block.mlp.fc2, fit, scales[1])


def _chosen_tokens(model: MatViT, count: int) -> Tensor:
    """(N, tokens of each picture): the class token where it is the embedding, or else some patches."""
    config = model.config
    if config.pool == "token":
        return torch.zeros(count, 1, dtype=torch.int64)
    prefix, patches = config.reg_tokens + int(config.class_token), (config.image_size // config.patch_size) ** 2
    order = torch.rand(count, patches, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return prefix + order[:, :_PATCHES]


def _input_of(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `layer` is given while `run` runs, and what that returns."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        output = run()
    finally:
        handle.remove()
    return seen[0], output


def _missing(model: MatViT, found: Tensor, wanted: Tensor) -> Tensor:
    """(T, D): from `found` to `wanted`, scaled to the mean and spread of `found` where a norm of each token follows."""
    if isinstance(model.vit.norm, nn.Identity):
        return wanted - found
    standard = (wanted - wanted.mean(dim=1, keepdim=True)) / wanted.std(dim=1, keepdim=True).clamp(min=1e-6)
    return standard * found.std(dim=1, keepdim=True) + found.mean(dim=1, keepdim=True) - found


@dataclass(frozen=True, slots=True)
class _Fit:
    matrix: Tensor  # (F, D)
    offset: Tensor  # (D,)

    def of(self, features: Tensor) -> Tensor:
        return features @ self.matrix + self.offset


def _ridge(features: Tensor, targets: Tensor, groups: Tensor, *, offset: bool) -> _Fit:
    """(T, F), (T, D), group of each (T,): the ridge regression whose penalty predicts left-out groups best."""
    mean, spread, target_mean = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6), targets.mean(dim=0)
    if not offset:
        mean, target_mean = torch.zeros_like(mean), torch.zeros_like(target_mean)
    rows, wanted = (features - mean) / spread, targets - target_mean
    parts = [groups == group for group in range(_GROUPS)]
    grams = torch.stack([rows[part].T @ rows[part] for part in parts])  # (K, F, F)
    products = torch.stack([rows[part].T @ wanted[part] for part in parts])  # (K, F, D)

    def error(penalty: float) -> float:
        """Of all left-out groups together, the targets' own squares left out."""
        total = 0.0
        for gram, product in zip(grams, products, strict=True):
            matrix = _solve(grams.sum(dim=0) - gram, products.sum(dim=0) - product, penalty * len(rows))
            total += float((matrix * (gram @ matrix - 2 * product)).sum())
        return total

    best = min(PENALTIES, key=error)
    matrix = _solve(grams.sum(dim=0), products.sum(dim=0), best * len(rows)) / spread[:, None]
    return _Fit(matrix, target_mean - mean @ matrix)


def _solve(gram: Tensor, product: Tensor, penalty: float) -> Tensor:
    solution: Tensor = torch.linalg.solve(gram + penalty * torch.eye(len(gram), device=gram.device), product)
    return solution


def _scaled(tokens: Tensor, scale: Tensor | None) -> Tensor:
    return tokens if scale is None else tokens * scale


def _as_changes(name: str, layer: nn.Linear, fit: _Fit, scale: Tensor | None) -> dict[str, Tensor]:
    """The fit as deltas of the layer's tensors; a layer scale comes after it."""
    divisor = torch.ones_like(fit.offset) if scale is None else torch.where(scale.abs() < 1e-6, torch.inf, scale)
    changes = {f"{name}.weight": fit.matrix.T / divisor[:, None]}
    return changes if layer.bias is None else changes | {f"{name}.bias": fit.offset / divisor}
