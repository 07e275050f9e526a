"""Exact search equals brute force, whatever ties there are."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matvit.threads import limited
from retrieval import flat
from retrieval.flat import FlatSearch


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that a few thousand vectors are many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "BLOCK", 512)
        yield


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(ids, vectors, query, k):
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return np.lexsort((ids, -scores))[:k], scores


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    distinct=st.integers(1, 40),
    rows=st.integers(1, 2500),
    dim=st.sampled_from([1, 3, 16, 33]),
    k=st.integers(1, 320),
    batch=st.sampled_from([1, 3, 9]),
)
def test_equals_brute_force_with_duplicates(seed, distinct, rows, dim, k, batch):
    random = np.random.default_rng(seed)
    pool = unit(random.standard_normal((distinct, dim)))
    vectors = pool[random.integers(0, distinct, rows)]  # mostly duplicates: ties cross every border
    ids = random.permutation(rows * 2)[:rows].astype(np.int64)
    queries = unit(random.standard_normal((batch, dim)))
    search = FlatSearch(ids, [vectors[: rows // 2], vectors[rows // 2 :]], dim=dim)
    for query, (positions, scores) in zip(queries, search.search(queries, k=k), strict=True):
        expected, exact = brute_force(ids, vectors, query, k)
        np.testing.assert_array_equal(positions, expected)
        np.testing.assert_allclose(scores, exact[expected], rtol=0, atol=1e-14)


def test_one_query_equals_the_same_query_in_a_batch():
    random = np.random.default_rng(0)
    vectors = unit(random.standard_normal((500, 48)))
    search = FlatSearch(np.arange(500), [vectors], dim=48)
    queries = unit(random.standard_normal((40, 48)))
    for query, batched in zip(queries, search.search(queries, k=7), strict=True):
        [alone] = search.search(query[np.newaxis], k=7)
        np.testing.assert_array_equal(alone[0], batched[0])
        np.testing.assert_array_equal(alone[1], batched[1])


def test_one_query_is_compared_on_one_thread(monkeypatch):
    """A second one would have nothing to do but keep the first waiting."""
    vectors, taken, knn = unit(np.random.default_rng(0).standard_normal((50, 8))), [], faiss.knn

    def recording(*arguments, **named):
        taken.append(faiss.omp_get_max_threads())
        return knn(*arguments, **named)

    monkeypatch.setattr(faiss, "knn", recording)
    search = FlatSearch(np.arange(50), [vectors], dim=8)
    with limited("faiss", 3):
        search.search(vectors[:1], k=2)
        search.search(vectors[:2], k=2)
        assert faiss.omp_get_max_threads() == 3
    assert taken == [1, 3]


def test_the_order_of_the_vectors_does_not_matter():
    random = np.random.default_rng(1)
    vectors = np.repeat(unit(random.standard_normal((20, 8))), 10, axis=0)
    ids = np.arange(200, dtype=np.int64)
    shuffled = random.permutation(200)
    query = vectors[:1]
    [(found, _)] = FlatSearch(ids, [vectors], dim=8).search(query, k=15)
    [(again, _)] = FlatSearch(ids[shuffled], [vectors[shuffled]], dim=8).search(query, k=15)
    np.testing.assert_array_equal(ids[found], ids[shuffled][again])


@pytest.mark.parametrize("batch", [1, 9])
def test_of_many_equal_vectors_the_lowest_ids_are_found(batch):
    vectors = np.repeat(unit(np.random.default_rng(2).standard_normal((2, 8))), 5000, axis=0)
    search = FlatSearch(np.arange(len(vectors))[::-1].copy(), [vectors], dim=8)
    for positions, _ in search.search(np.repeat(vectors[:1], batch, axis=0), k=3):
        assert positions.tolist() == [4999, 4998, 4997]  # equal scores by id


@pytest.mark.parametrize("order", [1, -1])
def test_galleries_sorted_for_or_against_the_query_give_the_same_hits(order):
    """The best come in the last block, or all candidates in the first."""
    random = np.random.default_rng(3)
    vectors = unit(random.standard_normal((5000, 16)))
    queries = np.repeat(unit(random.standard_normal((1, 16))), 8, axis=0)
    vectors = vectors[np.argsort(vectors @ queries[0])[::order]]
    ids = np.arange(len(vectors))
    for positions, _ in FlatSearch(ids, [vectors], dim=16).search(queries, k=25):
        np.testing.assert_array_equal(positions, brute_force(ids, vectors, queries[0], 25)[0])


def test_an_empty_gallery_finds_nothing_and_nan_is_refused():
    search = FlatSearch(np.empty(0, dtype=np.int64), [], dim=4)
    [(positions, scores)] = search.search(np.ones((1, 4), dtype=np.float32), k=3)
    assert len(positions) == len(scores) == 0
    with pytest.raises(ValueError, match="finite"):
        search.search(np.full((1, 4), np.nan, dtype=np.float32), k=3)
