"""Adapting fits what S, M and L own, keeps XL to the bit, and keeps the old where nothing is surely gained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from matvit import DatasetError, MatViT, adapting
from matvit.adapting import adapt
from matvit.agreement import Agreement, agreement_with_full, compare, read_pictures
from matvit.last_block import fit_last_block, read_tokens
from matvit.private import PrivateConfig


def _pictures(count: int) -> list[Any]:
    """Pictures in which there is something to tell apart: a few coloured patches each."""
    random = np.random.default_rng(0)
    small = [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize((32, 32)) for pixels in small]


def test_the_full_encoder_agrees_with_itself(tiny: MatViT) -> None:
    pixels = tiny.preprocessing.batch(_pictures(12), size=32)
    found = agreement_with_full(tiny, pixels, [0, 5], specs=["XL", "S"])
    assert found["XL"].cosine == pytest.approx(1, abs=1e-5)
    assert (found["XL"].first, found["XL"].agreement_at_10) == (1, 1)
    assert found["S"].cosine < 0.99


def test_tokens_are_those_of_the_nested_forward(vit: VisionTransformer, images: Tensor) -> None:
    """In every family, whatever makes the embedding of the tokens."""
    model = MatViT.from_timm(vit)
    for spec in ("S", "XL"):
        tokens = read_tokens(model, images.numpy(), model.shape.spec(spec))
        np.testing.assert_allclose(tokens.embeddings, model(images, spec).detach().numpy(), atol=1e-5)
        assert tokens.incoming.shape == tokens.attended.shape == tokens.outgoing.shape
        assert tokens.picture.tolist() == sorted(tokens.picture.tolist())


def test_the_fit_brings_tokens_nearer_in_every_family(vit: VisionTransformer) -> None:
    model = MatViT.from_timm(vit)
    model.add_private(PrivateConfig(rank=None, last=True))
    assert model.private is not None
    pixels = model.preprocessing.batch(_pictures(80), size=32)
    spec = model.shape.spec("S")
    block = model.block_of(3, spec.widths[3])
    full = read_tokens(model, pixels, model.shape.spec())
    own = read_tokens(model, pixels, spec)
    learnt = own.picture % 4 != 0
    for name, delta in fit_last_block(model, block, own.of(learnt), full.outgoing[learnt]).items():
        owned = model.private.of(3, width=16, full_width=128)
        assert owned is not None
        owned.add(name, delta)
    after = read_tokens(model, pixels, spec)
    distance = [((one.embeddings - full.embeddings)[::4] ** 2).sum() for one in (own, after)]
    assert distance[1] < 0.9 * distance[0]  # on pictures that were held back


def test_small_encoders_come_nearer_and_the_full_one_stays_to_the_bit(tiny: MatViT, images: Tensor) -> None:
    space, full = tiny.space_id, tiny(images).detach()
    result = adapt(tiny, _pictures(100))
    assert (result.pictures + result.near_copies, result.skipped) == (100, ())
    assert "S" in result.kept
    assert result.gains["S"].after.cosine > result.gains["S"].before.cosine + 0.05
    assert tiny.space_id == space
    torch.testing.assert_close(tiny(images), full, rtol=0, atol=0)


def test_what_was_owned_before_is_kept_and_added_to(tiny: MatViT, images: Tensor) -> None:
    tiny.add_private(PrivateConfig(rank=2))
    assert tiny.private is not None
    with torch.no_grad():
        for parameter in tiny.private.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    old = {name: tensor.clone() for name, tensor in tiny.private.state_dict().items()}
    result = adapt(tiny, _pictures(60))
    assert result.kept
    assert tiny.private.config == PrivateConfig(rank=2, last=True)
    new = tiny.private.state_dict()
    changed = {name for name, tensor in old.items() if not torch.equal(new[name], tensor)}
    assert {name.partition("-weight")[0].rpartition(".")[2] for name in changed} == {"attn-proj-bias", "mlp-fc2-bias"}
    assert all(name.startswith(tuple(f"blocks.{owner}.3." for owner in result.kept)) for name in changed)


def test_a_granularity_that_does_not_surely_gain_keeps_what_it_owned(
    tiny: MatViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, lows = adapting._gain, iter([0.1, -0.1, 0.0])
    monkeypatch.setattr(adapting, "_gain", lambda *vectors: replace(measure(*vectors), low=next(lows)))
    before = {spec: tiny(images, spec).detach() for spec in ("S", "M", "L")}
    assert adapt(tiny, _pictures(60)).kept == ("S",)
    assert not torch.equal(tiny(images, "S"), before["S"])
    for spec in ("M", "L"):
        torch.testing.assert_close(tiny(images, spec), before[spec], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lost", "won", "kept"), [(0, 0, True), (1, 0, True), (4, 3, True), (3, 4, True), (11, 6, False), (5, 0, False)]
)
def test_a_granularity_whose_first_hits_are_clearly_less_often_xls_keeps_what_it_owned(
    monkeypatch: pytest.MonkeyPatch, lost: int, won: int, kept: bool
) -> None:
    """Though its first ten hits agree more: of 80 queries so many lose XL's first hit, and so many find it."""
    before, after = np.zeros(80), np.zeros(80)
    before[:lost], after[lost : lost + won] = 1, 1
    sides = iter(
        Agreement(cosine=0.9, first_by_query=first, by_query=np.full(80, share), recall=None)
        for first, share in ((before, 0.5), (after, 0.6))
    )
    monkeypatch.setattr(adapting, "compare", lambda *_: next(sides))
    nothing = np.zeros((80, 2), np.float32)
    gain = adapting._gain(nothing, nothing, nothing, None)
    assert gain.low > 0
    assert gain.kept == kept


def test_labels_are_measured_by_and_not_learnt_from(tiny: MatViT, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    images, other = _pictures(60), MatViT.from_timm(tiny.extract("XL"))
    result = adapt(tiny, [tmp_path / "no.jpg", *images], labels=["z", *"ab" * 30])
    plain = adapt(other, images, labels=["a"] * 60)
    for name, gain in result.gains.items():
        assert (gain.low, gain.high) == pytest.approx((plain.gains[name].low, plain.gains[name].high), abs=1e-3)
        assert plain.gains[name].after.recall is None
    gallery = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    asked = compare(gallery, gallery, np.arange(4), np.array([0, 0, 1, 2]))
    assert asked.recall == 1  # the last two have no other picture of theirs to find


def test_near_copies_of_a_picture_are_left_out_and_counted_so_that_a_burst_flatters_no_gain(tiny: MatViT) -> None:
    images, other = _pictures(60), MatViT.from_timm(tiny.extract("XL"))
    negative = Image.fromarray(255 - np.asarray(images[0]))
    burst = [image.point(lambda value: min(value + 2, 255)) for image in images[:3] for _ in range(20)]
    result = adapt(tiny, [*burst[:40], *images, *burst[40:], negative], labels=["a"] * 40 + [*"ab" * 30] + ["b"] * 21)
    assert (result.pictures, result.near_copies) == (61, 60)
    plain = adapt(other, [burst[0], burst[20], *images[2:], negative], labels=[*"aa", *"ab" * 29, "b"])
    assert result.gains["S"].after.recall == plain.gains["S"].after.recall
    assert (result.gains["S"].low, plain.near_copies) == (plain.gains["S"].low, 0)


def test_nothing_gained_leaves_the_encoder_as_it_was(tiny: MatViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "fit_last_block", lambda *_: {})
    assert adapt(tiny, _pictures(60)).kept == ()
    assert tiny.private is None


def test_an_adapted_encoder_is_loaded_as_it_was_saved(tiny: MatViT, images: Tensor, tmp_path: Path) -> None:
    adapt(tiny, _pictures(60))
    tiny.save_pretrained(tmp_path / "adapted")
    loaded = MatViT.from_pretrained(tmp_path / "adapted")
    for spec in ("S", "1S.1M.1L.1XL"):
        torch.testing.assert_close(loaded(images, spec), tiny(images, spec), rtol=0, atol=0)


def test_pictures_that_are_decoded_at_once_keep_their_order(tiny: MatViT, tmp_path: Path) -> None:
    for number, picture in enumerate(_pictures(12)):
        shown = picture.point(lambda value, number=number: value // 13 + 19 * number)  # brighter each time
        shown.resize((400 - 30 * number,) * 2).save(tmp_path / f"{number:02}.png")
    (tmp_path / "03.png").write_bytes(b"no picture")
    found = read_pictures(tiny, sorted(tmp_path.iterdir()), fewest=1, most=12)
    assert found.places.tolist() == [0, 1, 2, *range(4, 12)]
    assert np.all(np.diff(found.pixels.mean(axis=(1, 2, 3))) > 0)
    assert [one.path for one in found.skipped] == [str(tmp_path / "03.png")]


def test_too_few_pictures_are_refused_and_the_unreadable_do_not_count(tiny: MatViT, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="39 of 40 pictures can be used, and 40 are needed: 1 cannot be read"):
        adapt(tiny, [*_pictures(39), tmp_path / "no.jpg"])
    with pytest.raises(DatasetError, match="39 of 44 pictures can be used, and 40 are needed: 5 are near-copies"):
        adapt(tiny, [*_pictures(39), *_pictures(5)])
