"""Filters, thresholds, items, blends and duplicates equal brute force; what they refuse is one sentence."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval import Blend, Index, Retriever, SearchError, exact
from retrieval.duplicates import linked
from retrieval.flat import FlatSearch, exact_scores
from retrieval.gallery import Gallery
from retrieval.queries import Asked, depth, fuse_ranks
from retrieval.retriever import Retriever as OnGallery

DIM = 4
LABELS = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that some dozen vectors are many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK", 7)
        yield


def made(seed, count, *, distinct=12):
    """A retriever on random vectors, many of them equal, with a label, a price and a file content each."""
    random = np.random.default_rng(seed)
    pool = random.standard_normal((distinct, DIM))
    pool = (pool / np.linalg.norm(pool, axis=1, keepdims=True)).astype(np.float32)
    vectors = pool[random.integers(0, distinct, count)]
    ids = random.permutation(count * 2)[:count].astype(np.int64)
    items = [{"label": LABELS[random.integers(3)], "price": int(random.integers(6))} for _ in range(count)]
    encoder = SimpleNamespace(embedding_dim=DIM, spec="XL")
    snapshot = SimpleNamespace(
        manifest=SimpleNamespace(encoder=encoder, generation=1),
        folder="index",
        full_path=lambda place: place[1].decode(),
        file_name=lambda place: place[1].decode(),
    )
    gallery = Gallery(
        snapshot=snapshot,
        ids=ids,
        places=[("root", b"%d" % number) for number in ids],
        digests=[bytes([content]) for content in random.integers(0, max(2, count), count)],
        vectors=FlatSearch(ids, [vectors], dim=DIM),
        _metadata=[json.dumps(item) for item in items],
    )
    return OnGallery(gallery, encoder=None), gallery, vectors, items


def ranked(ids, scores, keep, k):
    order = [int(row) for row in np.lexsort((ids, -scores)) if keep[row]]
    return [(int(ids[row]), min(1.0, max(-1.0, scores[row]))) for row in order[:k]]


def found(hits):
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    return [(hit.id, hit.score) for hit in hits]


galleries = {"seed": st.integers(0, 2**16), "count": st.integers(1, 60)}


@settings(max_examples=40)
@given(
    **galleries,
    k=st.one_of(st.none(), st.integers(1, 70)),
    min_score=st.one_of(st.none(), st.floats(-1, 1)),
    labels=st.one_of(st.none(), st.lists(st.sampled_from(LABELS), min_size=1)),
    low=st.integers(0, 5),
    exclude_self=st.booleans(),
)
def test_filtered_range_and_item_search_equal_brute_force(seed, count, k, min_score, labels, low, exclude_self):
    retriever, gallery, vectors, items = made(seed, count)
    present = {item["label"] for item in items}
    where = None if labels is None else {"label": labels, "price": {">=": low, "<": low + 3}}
    for row in range(min(3, count)):
        keep = np.ones(count, dtype=bool)
        if where is not None:
            keep = np.array([i["label"] in labels and low <= i["price"] < low + 3 for i in items])
        if exclude_self:
            keep &= [digest != gallery.digests[row] for digest in gallery.digests]
        scores = exact_scores(vectors, vectors[row])
        if min_score is not None:
            keep &= scores >= min_score - 1e-6
        hits = retriever.search(int(gallery.ids[row]), k=k, min_score=min_score, where=where, exclude_self=exclude_self)
        assert found(hits) == ranked(gallery.ids, scores, keep, k)
        assert all(hit.metadata["label"] in present for hit in hits)


@settings(max_examples=30)
@given(
    **galleries,
    like=st.lists(st.integers(0, 59), min_size=1, max_size=4),
    unlike=st.lists(st.integers(0, 59), max_size=2),
    k=st.integers(1, 12),
)
def test_blends_equal_brute_force(seed, count, like, unlike, k):
    retriever, gallery, vectors, _ = made(seed, count)
    like, unlike = [row % count for row in like], [row % count for row in unlike]
    asked = Blend([int(gallery.ids[row]) for row in like], unlike=[int(gallery.ids[row]) for row in unlike])
    votes, liked = np.zeros(count), np.zeros(count, dtype=bool)
    for rows, sign in ((like, 1), (unlike, -0.5)):
        for row in rows:
            order = np.lexsort((gallery.ids, -exact_scores(vectors, vectors[row])))[: max(10, k)]
            votes[order] += sign * 61 / (61 + np.arange(len(order))) / len(rows)
            liked[order] |= sign > 0
    by_rank = found(retriever.search(Blend(asked.like, unlike=asked.unlike, fusion="rank"), k=k))
    assert [score for _, score in by_rank] == pytest.approx(
        [score for _, score in ranked(gallery.ids, votes, liked, k)], abs=1e-6
    )
    mean = vectors[like].mean(axis=0) - (0.5 * vectors[unlike].mean(axis=0) if unlike else 0)
    if np.linalg.norm(mean) < 1e-2:
        return
    expected = ranked(gallery.ids, vectors @ (mean / np.linalg.norm(mean)), np.ones(count, dtype=bool), k)
    scores = [hit.score for hit in retriever.search(asked, k=k)]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-5)


def test_by_rank_what_is_first_for_one_picture_stays_ahead_of_what_is_middling_for_all():
    """32 pictures, and two unlike ones asked with: each is first for itself, last for the other."""
    ids = np.arange(32)
    asked = Asked(blend=Blend([0, 31], fusion="rank"), single=False)
    first = np.array([0, *range(2, 11), 1, *range(11, 32)])
    second = np.array([31, *range(20, 29), 1, *range(2, 20), 29, 30, 0])
    whole, cut = ([(order[:end], order[:end]) for order in (first, second)] for end in (None, depth(2)))
    assert not {0, 31} & set(fuse_ranks(asked, whole, ids=ids, k=2)[0].tolist())
    assert fuse_ranks(asked, cut, ids=ids, k=2)[0].tolist() == [0, 31]


@settings(max_examples=30)
@given(**galleries, min_score=st.one_of(st.none(), st.floats(-1, 1)), block=st.integers(1, 20))
def test_duplicates_are_the_connected_components_of_all_pairs(seed, count, min_score, block):
    retriever, gallery, vectors, _ = made(seed, count)
    alike = np.array([[a == b for a in gallery.digests] for b in gallery.digests])
    if min_score is not None:
        alike |= np.array([exact_scores(vectors, vector) for vector in vectors]) >= min_score - 1e-6
    reach = alike
    for _ in range(7):  # 2^7 steps: further than 60 pictures reach
        reach = reach.astype(int) @ reach.astype(int) > 0
    groups = {tuple(sorted(gallery.ids[row].tolist())) for row in reach if row.sum() > 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.duplicates._BLOCK", block)
        answer = retriever.duplicates(min_score=min_score)
    assert [tuple(picture.id for picture in group) for group in answer] == sorted(groups)


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_scores_at_least_one_with_itself_and_with_its_copies(seed):
    retriever, gallery, vectors, _ = made(seed, 60)
    assert min(exact_scores(vectors, vector)[row] for row, vector in enumerate(vectors)) < 1.0
    for number in gallery.ids.tolist():
        assert number in [hit.id for hit in retriever.search(number, k=None, min_score=1.0)]
    grouped = {picture.id for group in retriever.duplicates(min_score=1.0) for picture in group}
    copied = {a for a, v in enumerate(vectors) if sum((v == other).all() for other in vectors) > 1}
    assert {int(gallery.ids[row]) for row in copied} <= grouped


def test_duplicates_of_many_equal_pictures_are_one_group():
    vectors = np.tile(np.float32([0.6, 0.8]), (5000, 1))
    [group] = linked(FlatSearch(np.arange(5000), [vectors], dim=2), same=(), min_score=1 - 1e-6)
    assert len(group) == 5000


# --- on real indexes -----------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, photos, elastic):
    (photos / "copy.png").write_bytes((photos / "1.png").read_bytes())
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


@pytest.fixture
def retriever(index, elastic):
    return Retriever.open(index.path, encoder=elastic)


def names(hits):
    return [hit.path.name for hit in hits]


def test_an_item_finds_what_its_file_finds_and_nothing_is_encoded(retriever, index, elastic):
    paths = retriever.paths()
    by_file = retriever.search_many(list(paths.values()), k=4)
    before = elastic.extracted
    by_item = Retriever.open(index.path, encoder=elastic).search_many(paths, k=4)
    assert elastic.extracted == before
    for number, item, file in zip(paths, by_item, by_file, strict=True):
        assert [hit.id for hit in item] == [hit.id for hit in file]
        assert [hit.score for hit in item] == pytest.approx([hit.score for hit in file], abs=1e-6)
        assert (item.query, item.spec, item.runtime) == (str(paths[number]), "XL", "index")
        assert (item.latency_ms.preprocess, item.latency_ms.encode) == (0, 0)


def test_pictures_and_items_mix_in_one_batch(retriever, photos):
    number = next(number for number, path in retriever.paths().items() if path.name == "2.png")
    item, picture, both = retriever.search_many(
        [np.int64(number), photos / "3.png", Blend([number, photos / "3.png"], unlike=[photos / "4.png"])], encoder="S"
    )
    assert (item.spec, picture.spec, both.spec) == ("XL", "S", "S")
    assert (names(item)[0], names(picture)[0], set(names(both)[:2])) == ("2.png", "3.png", {"2.png", "3.png"})
    assert both.query == f"{photos / '2.png'} + {photos / '3.png'} - {photos / '4.png'}"
    assert item.latency_ms.encode == 0 < picture.latency_ms.encode


def test_the_folder_is_the_label_where_there_is_none(retriever, photos):
    hits = retriever.search(photos / "sub" / "8.png", k=None)
    assert hits[0].metadata == {"label": "sub"}
    assert [hit.metadata for hit in hits if hit.path.parent == photos] == [{}] * 8
    assert sorted(names(retriever.search(photos / "1.png", where={"label": "sub"}))) == ["7.png", "8.png", "9.png"]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_ones_own_file_and_its_copies_can_be_left_out(retriever, photos, as_bytes):
    query = (photos / "1.png").read_bytes() if as_bytes else photos / "1.png"
    assert names(retriever.search(query, k=2)) == ["1.png", "copy.png"]
    assert len(retriever.search(query, k=9, exclude_self=True)) == 9
    assert not {"1.png", "copy.png"} & set(names(retriever.search(query, k=99, exclude_self=True)))


def test_a_file_that_changed_since_is_left_out_by_its_path(retriever, photos, picture):
    (photos / "2.png").write_bytes(picture(99))
    assert "2.png" not in names(retriever.search(photos / "2.png", k=99, exclude_self=True))


def test_copies_are_found_by_their_content(retriever):
    [group] = retriever.duplicates(min_score=None)
    assert sorted(names(group)) == ["1.png", "copy.png"]
    assert [picture.same_content for picture in group] == [True, True]


@pytest.mark.parametrize(
    ("query", "options", "sentence"),
    [
        (10000, {}, "holds no picture with id 10000; take one that a search shows"),
        (Blend([]), {}, "Blend: 'like' is empty; give"),
        (Blend("1.png"), {}, "Blend: 'like' is no list; give"),
        (Blend([0], unlike=7), {}, "Blend: 'unlike' is no list; give"),
        (Blend([0], fusion="max"), {}, "Blend: fusion is 'max'; give"),
        (Blend([0], unlike=[True]), {}, "search: a bool is no picture; give"),
        (0, {"where": "label"}, "where: where is a str; give"),
        (0, {"where": {"lable": "dog"}}, "where: no picture has 'lable'; use one of: label"),
        (0, {"where": {1: 2}}, "where: no picture has '1'; use one of: label"),
        (0, {"where": {"label": []}}, "where: 'label' is asked to be []; give"),
        (0, {"where": {"label": b"dog"}}, "where: 'label' is asked to be b'dog'; give"),
        (0, {"where": {"label": None}}, "where: 'label' is asked to be None; give"),
        (0, {"where": {"label": {"=": 3}}}, "where: 'label' is compared by '='; use one of <, <=, >, >="),
        (0, {"where": {"label": {}}}, "where: 'label' has no bound; give"),
        (0, {"where": {"label": {"<": 3}}}, "where: 'label' has no number to compare; compare"),
        (0, {"where": {"label": {"<": float("nan")}}}, "where: 'label' is asked to be nan; give"),
        (0, {"min_score": float("nan")}, "search: min_score is nan; give"),
        (Image.new("RGB", (8, 8)), {"exclude_self": True}, "exclude_self: a PIL image does not tell its file; give"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(retriever, query, options, sentence):
    with pytest.raises(SearchError) as caught:
        retriever.search(query, **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_threads_search_while_another_reloads(index, retriever, photos, picture):
    counts, failures, stop = set(), [], threading.Event()

    def search():
        try:
            while not stop.is_set():
                hits = retriever.search(photos / "1.png", k=None, where={"label": ["sub", "none"]}, exclude_self=True)
                counts.add((hits.generation, len(hits)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    expected = {(retriever.generation, 3)}
    for number in range(3):
        (photos / "sub" / f"new{number}.png").write_bytes(picture(200 + number))
        index.ingest(photos)
        expected.add((retriever.reload(), 4 + number))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert counts <= expected
