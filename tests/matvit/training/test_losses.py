"""Losses: known values, finite everywhere, and gradients that reach every trained submodel."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from matvit import MatViT
from matvit.training import losses
from matvit.training.batches import Batch
from matvit.training.heads import Heads
from matvit.training.objective import objective
from matvit.training.recipe import Losses


def unit(rows: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_classification_is_the_mean_over_all_pictures_of_their_own_sets():
    logits = [torch.zeros(3, 4), torch.zeros(1, 2)]
    targets = [F.one_hot(torch.tensor([0, 1, 2]), 4).float(), F.one_hot(torch.tensor([1]), 2).float()]
    expected = (3 * math.log(4) + math.log(2)) / 4
    assert losses.classification(logits, targets).item() == pytest.approx(expected)


def test_teacher_classes_is_least_where_the_probabilities_agree():
    wanted = torch.tensor([[0.7, 0.2, 0.1]])
    entropy = -(wanted * wanted.log()).sum().item()
    assert losses.teacher_classes(wanted.log(), wanted).item() == pytest.approx(entropy)
    assert losses.teacher_classes(torch.zeros(1, 3), wanted).item() > entropy


def test_teacher_features_compares_directions():
    one = unit(4)
    assert losses.teacher_features(3 * one, one).item() == pytest.approx(0, abs=1e-6)
    assert losses.teacher_features(-one, one).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [losses.cosine, losses.similarity])
def test_alignment_is_zero_where_embeddings_equal_the_anchors(loss):
    anchors = unit(8)
    assert loss(anchors, anchors).item() == pytest.approx(0, abs=1e-6)
    assert loss(unit(8, seed=1), anchors).item() > 0.1


def test_contrast_is_chance_for_equal_anchors_and_low_for_found_ones():
    assert losses.contrast(unit(8), unit(1).expand(8, -1)).item() == pytest.approx(math.log(8), rel=1e-5)
    assert losses.contrast(torch.eye(8), torch.eye(8)).item() < 1e-6


def test_the_centred_cosine_sees_through_a_direction_that_all_embeddings_share():
    shared, own = 10 * unit(1), unit(8, seed=1)
    own = own - own.mean(dim=0)
    anchors, opposite = F.normalize(shared + own, dim=-1), F.normalize(shared - own, dim=-1)
    assert losses.cosine(opposite, anchors).item() < 0.05
    assert losses.cosine(opposite, anchors, centred=True).item() > 1.9
    assert losses.cosine(anchors, anchors, centred=True).item() == pytest.approx(0, abs=1e-6)


def test_a_recipe_asks_for_the_centred_cosine():
    embeddings, anchors = unit(8), unit(8, seed=1)
    nothing = Batch(images=torch.empty(8, 3, 1, 1), targets=[], probabilities=None, features=None)
    for centred in (False, True):
        weights = Losses(cosine=2, centred=centred)
        found = objective(Heads(16, [2], None), weights, embeddings, nothing, anchors, prefix=8)
        assert found.item() == pytest.approx(2 * losses.cosine(embeddings, anchors, centred=centred).item())
    assert not Losses(centred=True).train_something


CENTRED = partial(losses.cosine, centred=True)


@pytest.mark.parametrize("loss", [losses.cosine, CENTRED, losses.similarity, losses.contrast])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_values_and_gradients_are_finite_for_alike_and_opposite_embeddings(loss, rows):
    anchors = unit(rows)
    for start in (anchors, -anchors, anchors[:1].expand(rows, -1)):
        embeddings = start.clone().requires_grad_()
        value = loss(embeddings, anchors)
        value.backward()
        assert value.isfinite()
        assert embeddings.grad is not None
        assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("loss", [losses.cosine, losses.similarity, losses.contrast])
@pytest.mark.parametrize("spec", ["S", "M", "L", "XL"])
def test_gradients_reach_exactly_the_hidden_units_of_the_trained_submodel(loss, spec):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    model = MatViT.from_timm(vit)
    loss(model(torch.randn(6, 3, 16, 16), spec), unit(6)).backward()
    width = model.shape.spec(spec).widths[0]
    for block in model.vit.blocks:
        reached = block.mlp.fc1.weight.grad.abs().sum(dim=1) > 0
        assert reached[:width].all()
        assert not reached[width:].any()
