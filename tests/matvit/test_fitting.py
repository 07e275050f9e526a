"""The closed-form start: what the cut hidden units gave comes from the kept ones, as far as these can give it."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from matvit import MatViT
from matvit.fitting import fit_private
from matvit.importance import order_by_importance
from matvit.private import PrivateConfig
from matvit_data import demo_photos


def test_units_that_repeat_the_kept_ones_are_made_up_for_whole(tiny: MatViT, images: Tensor) -> None:
    width = tiny.shape.spec("S").widths[0]
    with torch.no_grad():
        for block in tiny.vit.blocks:
            for tensor in (block.mlp.fc1.weight, block.mlp.fc1.bias):
                tensor.copy_(tensor[:width].repeat(len(tensor) // width, *[1] * (tensor.ndim - 1)))
    full, truncated = tiny(images).detach(), tiny(images, "S").detach()
    tiny.add_private(PrivateConfig(rank=tiny.embedding_dim))
    fit_private(tiny, images)
    assert (truncated - full).abs().max() > 0.1
    torch.testing.assert_close(tiny(images, "S"), full, rtol=0, atol=5e-3)  # the ridge's doing


def test_the_full_encoder_stays_to_the_bit(model: MatViT, owning: MatViT, images: Tensor) -> None:
    fitted = copy.deepcopy(owning)  # which other tests use as it is
    fit_private(fitted, images)
    assert fitted.space_id == model.space_id
    torch.testing.assert_close(fitted(images), model(images), rtol=0, atol=0)


@pytest.fixture
def seeded() -> MatViT:
    """A random encoder with layers that differ, the same in every run."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return MatViT.from_timm(vit)


@pytest.mark.parametrize(("rank", "share"), [(4, 0.85), (32, 0.5)])
def test_it_lowers_what_truncation_costs_on_photographs_that_it_has_not_seen(
    seeded: MatViT, rank: int, share: float
) -> None:
    photos = [photo.file for photo in demo_photos() if photo.data_set == "grocery-store"][:120]
    pixels = torch.from_numpy(seeded.preprocessing.batch(photos, size=32))
    seen, unseen = pixels[::2], pixels[1::2]
    order_by_importance(seeded, seen)
    full = seeded(unseen)

    def loss(spec: str) -> float:
        return (1 - (seeded(unseen, spec) * full).sum(dim=-1)).mean().item()

    truncated = {spec: loss(spec) for spec in ("S", "M", "L")}
    seeded.add_private(PrivateConfig(rank=rank))
    fit_private(seeded, seen)
    for spec, before in truncated.items():
        assert loss(spec) < share * before
