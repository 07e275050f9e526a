"""Adapting trains what S, M and L own, keeps XL to the bit, and keeps the old where nothing is gained."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from matvit import DatasetError, MatViT, adapting
from matvit.adapting import Agreement, adapt, agreement_with_full


def _pictures(count: int) -> list[Image.Image]:
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


def test_small_encoders_come_nearer_and_the_full_one_stays_to_the_bit(
    tiny: MatViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # 80 steps, however busy the machine is
    monkeypatch.setattr(adapting, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 160 * 3))
    space, full = tiny.space_id, tiny(images).detach()
    result = adapt(tiny, _pictures(60), minutes=0.05)
    assert (result.pictures, result.held_back, result.skipped) == (48, 12, ())
    assert result.after["S"].cosine > result.before["S"].cosine + 0.02
    assert tiny.space_id == space
    torch.testing.assert_close(tiny(images), full, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_a_granularity_that_agrees_no_better_keeps_what_it_owned(
    tiny: MatViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(s: float, m: float, l: float) -> dict[str, Agreement]:  # noqa: E741
        values = {"S": s, "M": m, "L": l}
        return {name: Agreement(cosine=0, first=0, agreement_at_10=value) for name, value in values.items()}

    answers = iter([measured(0.5, 0.5, 0.5), measured(0.6, 0.5, 0.4)])
    monkeypatch.setattr(adapting, "agreement_with_full", lambda *_, **__: next(answers))
    before = {spec: tiny(images, spec).detach() for spec in ("S", "M", "L")}
    assert adapt(tiny, _pictures(40), minutes=0.01).kept == ("S",)
    assert not torch.equal(tiny(images, "S"), before["S"])
    for spec in ("M", "L"):
        torch.testing.assert_close(tiny(images, spec), before[spec], rtol=0, atol=0)


def test_too_few_pictures_are_refused_and_the_unreadable_do_not_count(tiny: MatViT, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    pictures: list[Any] = [*_pictures(39), tmp_path / "no.jpg"]
    with pytest.raises(DatasetError, match="39 of 40 pictures can be read, and 40 are needed"):
        adapt(tiny, pictures, minutes=0.01)
