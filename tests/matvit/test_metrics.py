"""Metrics against their definitions, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import matvit.metrics
from matvit.metrics import (
    NO_HIT,
    agreement,
    average_precision,
    bootstrap_intervals,
    interpolated_average_precision,
    recall_at_k,
    top_k,
)


def whole_numbers(seed: int, rows: int, width: int) -> matvit.metrics.FloatArray:
    """Small integers: their products are exact, and ties are many."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float32)


@given(
    seed=st.integers(0, 2**16),
    queries=st.integers(0, 12),
    gallery=st.integers(1, 30),
    k=st.integers(1, 35),
    block=st.integers(1, 200),
    leave_out=st.booleans(),
)
def test_top_k_is_the_sorted_list_with_ties_by_row_whatever_the_block(
    seed: int, queries: int, gallery: int, k: int, block: int, leave_out: bool
) -> None:
    query, items = whole_numbers(seed, queries, 3), whole_numbers(seed + 1, gallery, 3)
    exclude = np.random.default_rng(seed).integers(-1, gallery, (queries, 2)) if leave_out else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matvit.metrics, "_BLOCK_SCORES", block)
        scores, rows = top_k(query, items, k, exclude=exclude)
    for row in range(queries):
        barred = [] if exclude is None else exclude[row].tolist()
        found = [(-float(query[row] @ item), index) for index, item in enumerate(items) if index not in barred]
        expected = sorted(found)[:k]
        expected += [(np.inf, NO_HIT)] * (min(k, gallery) - len(expected))
        assert list(zip((-scores[row]).tolist(), rows[row].tolist(), strict=True)) == expected


def test_top_k_refuses_what_it_cannot_order() -> None:
    good = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="NaN"):
        top_k(np.full((1, 3), np.nan, dtype=np.float32), good, 1)
    with pytest.raises(ValueError, match="one width"):
        top_k(good[:, :2], good, 1)
    with pytest.raises(ValueError, match="gallery of 0"):
        top_k(good, good[:0], 1)
    with pytest.raises(ValueError, match="0 hits"):
        top_k(good, good, 0)


def test_recall_looks_at_the_first_k_hits_only() -> None:
    right = np.array([[False, False, True], [True, True, True], [False, False, False]])
    assert recall_at_k(right, 1).tolist() == [False, True, False]
    assert recall_at_k(right, 2).tolist() == [False, True, False]
    assert recall_at_k(right, 3).tolist() == [True, True, False]


def test_average_precision_by_hand() -> None:
    right = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    values = average_precision(right, np.array([2, 4, 9, 0]), k=4)
    assert values == pytest.approx([(1 + 2 / 3) / 2, (1 / 2) / 4, 1.0, 0.0])


def test_average_precision_is_normalised_by_what_k_hits_can_show() -> None:
    right, relevant = np.array([[True, True, False]]), np.array([50])
    assert average_precision(right, relevant, k=2) == pytest.approx([1.0])
    assert average_precision(right, relevant) == pytest.approx([2 / 50])


def test_map_at_r_looks_at_as_many_hits_as_there_are_right_pictures() -> None:
    """The worked example of Musgrave et al., section 2.3: ten to find, and what each order of hits is worth."""
    right = np.zeros((3, 12), dtype=bool)
    right[0, [0, 9]] = True  # 1 + 2/10
    right[1, :2] = True
    right[2, [10, 11]] = True  # beyond R
    values = average_precision(right, np.array([10, 10, 10]), k=None)
    assert values == pytest.approx([(1 + 0.2) / 10, 2 / 10, 0])
    assert average_precision(right[:1], np.array([0]), k=None).tolist() == [0.0]


@given(seed=st.integers(0, 2**16), relevant=st.integers(1, 20), k=st.none() | st.integers(1, 20))
def test_average_precision_is_one_exactly_when_all_that_can_be_found_comes_first(
    seed: int, relevant: int, k: int | None
) -> None:
    right = np.arange(25) < relevant
    shuffled = np.random.default_rng(seed).permutation(right)
    values = average_precision(np.stack([right, shuffled]), np.array([relevant] * 2), k=k)
    assert values[0] == pytest.approx(1.0)
    assert 0 <= values[1] <= 1 + 1e-12
    assert (values[1] > 1 - 1e-12) == bool(shuffled[: min(k or relevant, relevant)].all())


@given(right=st.lists(st.booleans(), min_size=1, max_size=15), missed=st.integers(0, 3))
def test_interpolated_average_precision_is_the_published_code(right: list[bool], missed: int) -> None:
    relevant = sum(right) + missed
    expected = 0.0
    for found, rank in enumerate(np.flatnonzero(right)):  # compute_ap of the authors' evaluation code
        before = 1.0 if rank == 0 else found / rank
        expected += (before + (found + 1) / (rank + 1)) / (2 * relevant)
    assert interpolated_average_precision(np.array([right]), np.array([relevant])) == pytest.approx([expected])


@given(seed=st.integers(0, 2**16), hits=st.integers(1, 12))
def test_agreement_is_the_share_of_common_hits_in_any_order(seed: int, hits: int) -> None:
    generator = np.random.default_rng(seed)
    found, reference = (np.stack([generator.permutation(20)[:hits] for _ in range(3)]) for _ in range(2))
    expected = [len(set(a) & set(b)) / hits for a, b in zip(found.tolist(), reference.tolist(), strict=True)]
    assert agreement(found, reference) == pytest.approx(expected)
    assert agreement(reference[:, ::-1], reference).tolist() == [1.0] * 3


def test_agreement_does_not_count_padding() -> None:
    assert agreement(np.array([[4, 5, NO_HIT]]), np.array([[5, 6, NO_HIT]])).tolist() == [0.5]


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_values() -> None:
    generator = np.random.default_rng(1)
    values = np.stack(
        [generator.choice([-100.0, 0.0, 100.0], 1000, p=[0.05, 0.8, 0.15]), generator.normal(size=1000)], 1
    )
    found = bootstrap_intervals(values)
    half = 1.96 * values.std(axis=0) / np.sqrt(len(values))
    assert found[:, 0] / half == pytest.approx((values.mean(axis=0) - half) / half, abs=0.1)
    assert found[:, 1] / half == pytest.approx((values.mean(axis=0) + half) / half, abs=0.1)
    assert (found == bootstrap_intervals(values)).all()  # same seed, same answer
    assert (found != bootstrap_intervals(values, seed=1)).any()


@given(block=st.integers(1, 5000))
@settings(max_examples=10)
def test_columns_are_drawn_together_in_blocks_of_any_size(block: int) -> None:
    values = np.random.default_rng(3).normal(size=(40, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matvit.metrics, "_BLOCK_DRAWS", block)
        low, high = bootstrap_intervals(np.concatenate([values, values, -values], axis=1), samples=200).T
    assert low[0] == low[1] == pytest.approx(-high[2])


def test_a_lower_level_gives_a_narrower_interval_and_equal_values_none() -> None:
    values = np.random.default_rng(2).normal(size=(100, 1))
    wide, narrow = bootstrap_intervals(values)[0], bootstrap_intervals(values, level=0.5)[0]
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert bootstrap_intervals(np.full((5, 1), 2.0)).tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="no values"):
        bootstrap_intervals(np.empty((0, 1)))
