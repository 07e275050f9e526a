"""Mix'n'Match specs: which ones are drawn, and how they lie against the uniform ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matvit import MatViT
from matvit.errors import SpecError
from matvit.mixing import against_line, is_mixed, mixed_specs, summary
from matvit.shared_weights import SharedWeights
from matvit.spec import EncoderShape

SHAPE = EncoderShape(
    ffn_widths=(1536,) * 12, num_heads=6, image_size=112, keep_order=tuple(range(12)), image_size_step=14
)
SIZES = {192: 0, 384: 1, 768: 2, 1536: 3}


def test_two_hundred_specs_half_of_them_as_the_paper_advises() -> None:
    mixed = mixed_specs(SHAPE, "mixed:200")
    assert (len(mixed.heuristic), len(mixed.random), len(set(mixed.specs))) == (100, 100, 200)
    assert not set(mixed.uniform) & set(mixed.specs)
    assert [str(spec) for spec in mixed.uniform] == ["S", "M", "L", "XL"]
    for spec in mixed.heuristic:
        sizes = [SIZES[width] for width in spec.widths]
        assert {after - before for before, after in pairwise(sizes)} <= {0, 1}
    for spec in mixed.random:
        sizes = [SIZES[width] for width in spec.widths]
        assert not {after - before for before, after in pairwise(sizes)} <= {0, 1}
    spread = sorted(sum(spec.widths) / sum(SHAPE.ffn_widths) for spec in mixed.specs)
    assert spread[10] < 0.25 < 0.75 < spread[-10]  # from end to end of the line


@given(count=st.integers(1, 60), blocks=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_equal_calls_give_equal_different_specs_and_never_more_than_asked(count: int, blocks: int, seed: int) -> None:
    shape = EncoderShape(ffn_widths=(64,) * blocks, num_heads=2, image_size=28)
    mixed = mixed_specs(shape, f"mixed:{count}", seed=seed)
    assert mixed == mixed_specs(shape, f"mixed:{count}", seed=seed)
    assert len(set(mixed.specs)) == len(mixed.specs) <= min(count, 4**blocks - 4)


def test_an_encoder_with_fewer_than_asked_is_not_searched_for_ever() -> None:
    shape = EncoderShape(ffn_widths=(64,) * 2, num_heads=2, image_size=28)
    assert len(mixed_specs(shape, "mixed:999999").specs) == 12


def test_an_encoder_of_hundreds_of_blocks_is_drawn_from_not_enumerated() -> None:
    shape = EncoderShape(ffn_widths=(64,) * 300, num_heads=2, image_size=28)
    mixed = mixed_specs(shape, "mixed:20")
    assert (len(mixed.heuristic), len(mixed.random)) == (10, 10)
    for spec in mixed.heuristic:
        assert set(pairwise(spec.widths)) <= {(8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)}


def test_other_axes_are_the_same_for_all() -> None:
    mixed = mixed_specs(SHAPE, "mixed-d10-r84:20")
    assert {(spec.depth, spec.image_size) for spec in (*mixed.specs, *mixed.uniform)} == {(10, 84)}
    assert len(mixed.specs) == 20


@pytest.mark.parametrize(
    "text", ["mixed", "mixed:", "mixed:0", "mixed:-3", "mixed:many", "mixed-x3:5", "mixed:9999999"]
)
def test_a_misspelt_request_is_refused(text: str) -> None:
    assert is_mixed(text)
    with pytest.raises(SpecError, match="how many"):
        mixed_specs(SHAPE, text)


def test_an_axis_that_the_encoder_lacks_is_refused() -> None:
    with pytest.raises(SpecError, match="heads"):
        mixed_specs(SHAPE, "mixed-h3:5")


def test_points_are_told_above_or_below_the_line_between_their_neighbours() -> None:
    shape = EncoderShape(ffn_widths=(64, 64), num_heads=2, image_size=28)
    mixed = mixed_specs(shape, "mixed:12")
    flops = {str(spec): sum(spec.widths) for spec in (*mixed.uniform, *mixed.specs)}
    recall = {str(spec): 0.5 for spec in mixed.specs} | {"S": 0.2, "M": 0.4, "L": 0.6, "XL": 0.8}
    points = {point.spec: point for point in against_line(mixed, recall=recall, flops=flops)}
    assert len(points) == 12
    assert points["1M.1L"].line == pytest.approx(0.5)
    assert not points["1M.1L"].above  # on the line is not above it
    assert points["1S.1M"].above
    assert points["1S.1M"].line == pytest.approx(0.3)
    assert not points["1L.1XL"].above
    assert points["1M.1L"].heuristic
    assert not points["1L.1M"].heuristic
    told = summary(list(points.values()), asked=12)
    assert (told["asked"], told["specs"]) == (12, 12)
    assert told["above_line"] == told["heuristic"]["above_line"] + told["random"]["above_line"]
    assert told["points"]["1S.1M"]["above_line"]
    assert told["heuristic"]["distance"] == pytest.approx({"mean": 0, "worst": -20, "best": 20}, abs=1e-9)
    assert summary([], asked=1)["random"] == {"specs": 0, "above_line": 0, "distance": None}


def test_shared_weights_compute_what_copies_compute(model: MatViT, images: Tensor) -> None:
    shared = SharedWeights(model=model)
    for text in ("XL", "1S.1XL.2M", "S-h2-d3" if model.axes.heads else "S-d3"):
        mine, copied = shared.encoder(text), model.encoder(text)
        assert (mine.spec, mine.space_id) == (copied.spec, copied.space_id)
        torch.testing.assert_close(mine.encode(images.numpy()), copied.encode(images.numpy()), rtol=0, atol=1e-5)
