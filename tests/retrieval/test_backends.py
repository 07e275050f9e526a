"""Approximate indexes: scores are exact, recall is measured and kept, deletions never come back, damage is harmless."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matvit.progress import silent
from retrieval import backends
from retrieval.backends import KINDS, cache
from retrieval.backends.approximate import ApproximateSearch
from retrieval.backends.build import LEAST_RECALL, build, build_order
from retrieval.backends.cache import read_cache
from retrieval.backends.choice import LEAST_ROWS, choose
from retrieval.backends.kinds import IvfPq
from retrieval.backends.rows import MappedRows
from retrieval.errors import IndexFormatError, IndexWarning, IngestError
from retrieval.files import sha256_file
from retrieval.flat import FlatSearch, exact_scores
from retrieval.index import Index
from retrieval.manifest import read_pointer
from retrieval.retriever import Retriever
from retrieval.writer import Entry

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
DIM = 32
ROWS = 4000


def clustered(rows, *, seed, clusters=40):
    centres = np.random.default_rng(99).standard_normal((clusters, DIM))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, clusters, rows)] + 0.5 * random.standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def mapped(vectors):
    third = len(vectors) // 3
    parts = [(part, np.arange(len(part))) for part in (vectors[:third], vectors[third:])]
    return MappedRows(parts, dim=DIM)


@pytest.fixture(scope="module", params=KINDS)
def built(request):
    vectors = clustered(ROWS, seed=1)
    found = build(KINDS[request.param], mapped(vectors), progress=silent)
    assert found is not None
    return KINDS[request.param], vectors, found


def searching(built, *, deleted=(), new=0):
    """The search of a gallery that lost `deleted` and gained `new` vectors since the index was built."""
    kind, vectors, found = built
    alive = np.setdiff1d(np.arange(ROWS), deleted)
    gallery = np.concatenate([vectors[alive], clustered(new, seed=5)])
    positions = np.full(ROWS, -1)
    positions[alive] = np.arange(len(alive))
    ids = np.random.default_rng(3).permutation(len(gallery)).astype(np.int64)
    search = ApproximateSearch(
        ids,
        mapped(gallery),
        index=found.index,
        kind=kind,
        setting=found.setting,
        positions=positions[np.concatenate(build_order(ROWS, found.held_out))],
    )
    return search, FlatSearch(ids, [gallery], dim=DIM), gallery


def recall(answers, truth):
    return np.mean(
        [len(set(a[0].tolist()) & set(t[0].tolist())) / len(t[0]) for a, t in zip(answers, truth, strict=True)]
    )


def test_recall_is_measured_and_holds_for_other_queries(built):
    search, exact, _ = searching(built)
    queries = clustered(2000, seed=2)
    assert built[2].recall >= LEAST_RECALL
    assert recall(search.search(queries, k=10), exact.search(queries, k=10)) >= LEAST_RECALL


def test_recall_holds_for_queries_that_come_from_where_no_vectors_of_the_index_lie(built):
    search, exact, _ = searching(built)
    away = np.random.default_rng(6).standard_normal((2000, DIM))
    queries = clustered(2000, seed=2) + 1.0 * away / np.linalg.norm(away, axis=1, keepdims=True)  # cosines of about 0.7
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    assert recall(search.search(queries, k=10), exact.search(queries, k=10)) >= LEAST_RECALL


@pytest.mark.parametrize("k", [50, 100])
def test_a_search_for_more_hits_looks_wider(k):
    rows, kind = 20_000, KINDS["ivfpq"]
    gallery = clustered(rows, seed=1, clusters=1000)  # a query's own cluster holds its 20 nearest
    found = build(kind, mapped(gallery), progress=silent)
    search = ApproximateSearch(
        np.arange(rows),
        mapped(gallery),
        index=found.index,
        kind=kind,
        setting=kind.settings()[3],
        positions=np.concatenate(build_order(rows, found.held_out)),
    )
    exact, queries = FlatSearch(np.arange(rows), [gallery], dim=DIM), clustered(200, seed=2, clusters=1000)
    assert recall(search.search(queries, k=k), exact.search(queries, k=k)) >= 0.95


def test_a_setting_that_is_enough_for_the_held_out_queries_by_chance_is_not_taken(monkeypatch):
    measured = []

    def found(_, queries, *, k):
        lost = len(measured) < 2  # one query in 13 finds nine of ten: 0.9923, and 0.0013 more or less
        measured.append(len(queries))
        every, best = np.arange(k), np.ones(k)
        worse = np.append(best[1:], 0.5)
        return [(every, worse if lost and row % 13 == 0 else best) for row in range(len(queries))]

    truth = np.arange(10), np.ones(10)
    monkeypatch.setattr(backends.build, "exact_search", lambda _, queries, **__: [truth] * len(queries))
    monkeypatch.setattr(ApproximateSearch, "search", found)
    chosen = build(KINDS["hnsw"], mapped(clustered(ROWS, seed=1)), progress=silent)
    assert measured == [800] * 3  # as they are, and turned away
    assert (chosen.recall, chosen.setting) == (1.0, KINDS["hnsw"].settings()[2])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    lost=st.sampled_from([0, 1, 2000, 3995]),
    new=st.sampled_from([0, 7, 300]),
    k=st.sampled_from([1, 10, 150, 9000]),
)
def test_hits_are_true_scores_of_pictures_that_are_there(built, seed, lost, new, k):
    deleted = np.random.default_rng(seed).choice(ROWS, lost, replace=False)
    search, exact, gallery = searching(built, deleted=deleted, new=new)
    queries = clustered(3, seed=seed)
    for query, (positions, scores), (_, best) in zip(
        queries, search.search(queries, k=k), exact.search(queries, k=k), strict=True
    ):
        assert len(positions) == min(k, len(gallery))
        assert len(set(positions.tolist())) == len(positions)
        np.testing.assert_array_equal(scores, exact_scores(gallery[positions], query))
        assert (np.diff(scores) <= 0).all()
        assert scores[0] <= best[0]


@pytest.mark.parametrize("lost", [20, 40, 80, 149])
def test_the_next_nearest_are_found_when_the_nearest_were_deleted_whatever_came_or_is_asked_beside(built, lost):
    vectors = built[1]
    for item in (0, 1000, 3999):
        near = np.argsort(-(vectors @ vectors[item]))[1 : lost + 1]
        search, exact, _ = searching(built, deleted=near, new=20)
        queries = np.stack([vectors[item], *clustered(5, seed=item)])
        answers, truth = search.search(queries, k=10), exact.search(queries, k=10)
        for answer, best in zip(answers, truth, strict=True):
            assert recall([answer], [best]) >= 0.9
        for query, (positions, _) in zip(queries, answers, strict=True):
            [(alone, _)] = search.search(query[np.newaxis], k=10)
            np.testing.assert_array_equal(alone, positions)


def test_new_vectors_are_searched_exactly_beside_the_index(built):
    search, _, gallery = searching(built, new=50)
    new = np.arange(ROWS, ROWS + 50)
    for position, (found, _) in zip(new, search.search(gallery[new], k=1), strict=True):
        assert found.tolist() == [position]
    np.testing.assert_array_equal(search.vectors(new), gallery[new])


def test_equal_scores_are_ordered_by_id(built):
    kind, vectors, _ = built
    doubled = np.repeat(vectors[:1000], 4, axis=0)
    found = build(kind, mapped(doubled), progress=silent)
    ids = np.random.default_rng(0).permutation(ROWS).astype(np.int64)
    search = ApproximateSearch(
        ids,
        mapped(doubled),
        index=found.index,
        kind=kind,
        setting=found.setting,
        positions=np.concatenate(build_order(ROWS, found.held_out)),
    )
    for positions, scores in search.search(doubled[::400], k=10):
        order = np.lexsort((ids[positions], -scores))
        np.testing.assert_array_equal(order, np.arange(10))


def test_of_many_equal_vectors_any_ten_are_right(built):
    """A hundred copies of one picture: no graph knows which of them have the least ids."""
    kind, vectors, _ = built
    copied = vectors.copy()
    copied[::40] = vectors[0]
    assert build(kind, mapped(copied), progress=silent).recall >= LEAST_RECALL


def test_nan_is_refused(built):
    search, _, _ = searching(built)
    with pytest.raises(ValueError, match="finite"):
        search.search(np.full((1, DIM), np.nan, dtype=np.float32), k=1)


def test_vectors_without_neighbours_are_no_case_for_a_quantiser():
    """Recall stays under what is asked of it: nothing is built, rather than something that loses silently."""
    noise = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    noise = noise / np.linalg.norm(noise, axis=1, keepdims=True)

    class Hurried(IvfPq):
        def settings(self):
            return super().settings()[:1]

    raw = MappedRows([(noise, np.arange(3000))], dim=64)
    assert build(Hurried(), raw, progress=silent) is None


@pytest.mark.parametrize(
    ("rows", "max_ram", "expected"),
    [
        (1_000, None, "exact"),
        (200_000, None, "exact"),
        (1_000_000, None, "ivfpq"),
        (100_000, 100_000_000, "sq"),
        (100_000, 10_000_000, "ivfpq"),
        (1_000_000, 1_000_000_000, "ivfpq"),
        (1_000_000, 1, "ivfpq"),  # nothing fits: the smallest there is
    ],
)
def test_auto_chooses_by_size_and_memory(rows, max_ram, expected):
    assert choose("auto", rows, 384, max_ram=max_ram)[0] == expected


def test_the_reason_says_when_nothing_fits_or_recall_cannot_be_measured():
    assert (
        choose("auto", 1_000_000, 384, max_ram=10**6)[1] == "1,000,000 vectors, 59.7 MB, more than the 1.0 MB allowed"
    )
    assert choose("hnsw", 999, 384, max_ram=None) == (
        "exact",
        "hnsw needs 1,000 pictures to measure its recall with (as asked)",
    )
    assert choose("hnsw", 1000, 384, max_ram=None) == ("hnsw", "as asked")


def test_searches_of_many_threads_do_not_disturb_one_another(built):
    search, _, _ = searching(built)
    queries = clustered(40, seed=8)
    alone = [search.search(query[np.newaxis], k=10)[0][0].tolist() for query in queries]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda q: search.search(q[np.newaxis], k=10)[0][0].tolist(), queries))
    assert together == alone


@pytest.fixture
def index(tmp_path, elastic):
    """An index of 1,500 clustered vectors in two segments, made without pictures."""
    made = Index.create(tmp_path / "photos.index", encoder=elastic)
    with made._writing() as writer:
        add(writer, 1000, seed=1)
        add(writer, 500, seed=2)
    return made


def add(writer, count, *, seed):
    start = writer.manifest.next_id
    vectors = clustered(count, seed=seed)[:, : writer.manifest.encoder.embedding_dim]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [
        Entry(item=HELPERS["item_of"](start + number), embedding=vector.astype(np.float32), replaces=None)
        for number, vector in enumerate(vectors)
    ]
    writer.publish(entries, deleted={}, roots={"root": "/photos"}, next_id=start + count)


def found_by_item(retriever, number, *, k):
    """Ids of the pictures nearest to one of the index, itself included."""
    gallery = retriever._gallery
    query = gallery.vectors.vectors(np.array([gallery.positions[number]]))
    [(positions, _)] = gallery.vectors.search(query, k=k)
    return gallery.ids[positions].tolist()


def manifest_of(index):
    path = index.path / "generations" / read_pointer(index.path).name
    return path, json.loads(path.read_bytes())


def publish(index, path, raw):
    for written in (path, path.with_suffix(".copy.json")):
        written.write_text(json.dumps(raw))
    (index.path / "CURRENT").write_text(f"{path.name} {sha256_file(path)}\n")


def set_held_out(index, held_out):
    path, raw = manifest_of(index)
    raw["approximate"]["held_out"] = held_out
    publish(index, path, raw)


@pytest.mark.parametrize("held_out", [151, 1501, 10**10])
def test_more_held_out_rows_than_any_version_takes_are_refused(index, held_out):
    index.set_search("sq")
    set_held_out(index, held_out)
    assert "bad field 'approximate'" in index.verify()[0]


def test_a_wrong_number_of_rows_in_a_manifest_allocates_nothing(index, elastic):
    index.set_search("sq")
    path, raw = manifest_of(index)
    raw["approximate"]["segments"]["0" * 16] = 2**60  # a segment that was merged away
    publish(index, path, raw)
    assert "does not hold 1152921504606848476 vectors" in index.verify()[0]
    index.delete([0])
    index.compact()  # which builds what is stale again
    assert index.verify() == []


@pytest.mark.parametrize("index_type", KINDS)
def test_an_approximate_index_of_another_order_than_its_manifest_says_is_found_and_built_again(
    index, elastic, index_type
):
    index.set_search(index_type)
    assert index.info().index_type == index_type
    set_held_out(index, 149)
    assert "in the order of its manifest" in index.verify()[0]
    report = Index.repair(index.path)
    assert (len(report.damage), report.whole, index.verify()) == (1, True, [])


def test_an_index_is_searched_as_it_was_set_and_says_so(index, elastic):
    info = index.set_search("hnsw")
    assert (info.index_type, info.index_reason) == ("hnsw", "as asked")
    assert info.recall_at_10 >= LEAST_RECALL
    assert info.index_parameters == {"links": 32, "construction": 200, "effort": 48, "depth": 16, "held_out": 150}
    retriever = Retriever.open(index.path, encoder=elastic)
    assert isinstance(retriever._gallery.vectors, ApproximateSearch)
    assert [found_by_item(retriever, number, k=1) for number in (3, 1200)] == [[3], [1200]]
    assert index.verify() == []
    info = index.set_search("auto", max_ram=10**6)
    assert (info.index_type, info.recall_at_10) == ("exact", None)
    assert info.index_reason == "1,500 vectors, 0.1 MB of 1.0 MB allowed"


@pytest.mark.parametrize("index_type", KINDS)
def test_filters_thresholds_and_many_hits_are_exact_whatever_the_index_type(index, elastic, index_type):
    exact = Retriever.open(index.path, encoder=elastic)
    assert index.set_search(index_type).index_type == index_type
    approximate = Retriever.open(index.path, encoder=elastic)
    assert isinstance(approximate._gallery.vectors, ApproximateSearch)
    where = {"label": "odd", "shelf": {">=": 5}}
    for options, count in (
        ({"k": 200, "where": where}, 200),
        ({"k": 1000, "where": where}, len([n for n in range(1500) if n % 2 and n % 7 >= 5])),
        ({"k": None, "min_score": 0.5}, None),
        ({"k": None, "where": where, "min_score": 0.2, "exclude_self": True}, None),
        ({"k": 5000}, 1500),
    ):
        [one], [other] = (retriever.search_many([7], **options) for retriever in (exact, approximate))
        assert one.hits == other.hits
        assert count is None or len(other) == count


def test_deleted_pictures_are_never_found_and_new_ones_are(index, elastic):
    index.set_search("sq")
    assert index.delete([3, 1200]) == 2
    with index._writing() as writer:
        add(writer, 20, seed=9)
    retriever = Retriever.open(index.path, encoder=elastic)
    assert isinstance(retriever._gallery.vectors, ApproximateSearch)
    assert set(found_by_item(retriever, 4, k=2000)) == set(range(1520)) - {3, 1200}


def test_an_approximate_index_whose_pictures_were_all_deleted_finds_nothing(index, elastic):
    index.set_search("sq")
    index.delete(range(index.info().items))
    retriever = Retriever.open(index.path, encoder=elastic)
    assert isinstance(retriever._gallery.vectors, ApproximateSearch)
    query = np.ones((2, index.info().embedding_dim), dtype=np.float32)
    assert [len(positions) for positions, _ in retriever._gallery.vectors.search(query, k=3)] == [0, 0]


@pytest.fixture(params=["flip", "cut", "gone"])
def damaged(index, request):
    """The index, set to be searched by "sq", whose cache is damaged in some way; and the cache."""
    index.set_search("sq")
    [file] = (index.path / "cache").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data if request.param == "flip" else data[:-1]) if request.param != "gone" else file.unlink()
    return index, file


def test_a_repair_that_was_killed_while_it_published_the_search_can_be_repeated(damaged, elastic):
    index, _ = damaged
    (index.path / "generations" / f"{index.generation + 1:06d}.json").touch()  # CURRENT never named it
    report = Index.repair(index.path, encoder=elastic)
    assert (report.whole, report.generation) == (True, index.generation + 1)
    assert Index.open(index.path).verify() == []


def test_a_damaged_cache_is_not_used_and_a_warning_says_how_to_mend_it(damaged, elastic):
    index, file = damaged
    with pytest.warns(IndexWarning) as caught:
        retriever = Retriever.open(index.path, encoder=elastic)
    [sentence] = [str(warning.message) for warning in caught]
    assert str(file) in sentence
    assert sentence.endswith(f"run: matvit repair {index.path}")
    assert "\n" not in sentence
    assert isinstance(retriever._gallery.vectors, FlatSearch)  # right, if slower
    assert found_by_item(retriever, 7, k=1) == [7]


def test_verify_finds_a_damaged_cache_and_repair_builds_it_again(damaged, elastic):
    index, file = damaged
    [problem] = index.verify()
    assert str(file) in problem
    report = Index.repair(index.path)
    assert (len(report.damage), report.embedded, report.whole) == (1, 0, True)
    assert index.verify() == []
    assert isinstance(Retriever.open(index.path, encoder=elastic)._gallery.vectors, ApproximateSearch)
    assert Index.repair(index.path).damage == ()


def test_the_next_writer_builds_a_damaged_cache_again(damaged, elastic):
    index, _ = damaged
    index.set_search("sq")
    assert isinstance(Retriever.open(index.path, encoder=elastic)._gallery.vectors, ApproximateSearch)


def test_one_more_picture_does_not_read_the_cache(index, tmp_path, elastic, picture, monkeypatch):
    index.set_search("sq")
    (tmp_path / "one.png").write_bytes(picture(1))
    monkeypatch.setattr(cache, "check_file", None)
    assert index.ingest(tmp_path / "one.png", encoder=elastic).indexed == 1


def test_a_cache_of_other_segments_is_no_cache_of_this_index(index):
    index.set_search("sq")
    manifest = index._snapshot.manifest
    entry, name = manifest.approximate, manifest.segments[0].name
    swapped = entry.model_copy(update={"segments": {name: 500, "0" * 16: 1000}})
    with pytest.raises(IndexFormatError, match="does not hold the segments as they are"):
        read_cache(index.path, manifest, swapped)


def test_a_file_that_asks_for_more_memory_than_it_has_bytes_is_refused(index):
    """Its sha256 may be right, and the manifest's too: who wrote both is unknown."""
    index.set_search("sq")
    manifest = index._snapshot.manifest
    file = index.path / "cache" / manifest.approximate.file
    data = file.read_bytes()
    length = data.index((1500 * manifest.encoder.embedding_dim).to_bytes(8, "little"))  # of the codes, in bytes
    data = data[:length] + (2**40).to_bytes(8, "little") + data[length + 8 :]
    file.write_bytes(data)
    entry = manifest.approximate.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(IndexFormatError, match="no index that this faiss reads"):
        read_cache(index.path, manifest, entry)


def test_reading_a_cache_leaves_faiss_as_it_was_for_the_program_around_it(index, elastic, tmp_path):
    larger = faiss.IndexFlatIP(64)
    larger.add(np.zeros((20_000, 64), dtype=np.float32))
    faiss.write_index(larger, str(tmp_path / "larger.faiss"))
    index.set_search("sq")
    Retriever.open(index.path, encoder=elastic)
    assert faiss.read_index(str(tmp_path / "larger.faiss")).ntotal == 20_000


def test_the_parameters_that_are_told_are_those_that_were_used(index):
    parameters = index.set_search("ivfpq").index_parameters
    manifest = index._snapshot.manifest
    lists = faiss.extract_index_ivf(read_cache(index.path, manifest, manifest.approximate))
    assert lists.nlist == parameters["lists"]


def test_a_writer_whose_publication_failed_says_what_is_published(index, failing):
    with index._writing() as writer:
        before = writer.manifest
        with failing("replace", at=0), pytest.raises(IngestError):
            writer.publish_search("exact", reason="changed", asked=before.asked, approximate=None)
        assert writer.manifest == before


def test_a_writer_that_replaces_the_cache_while_it_is_read_does_no_harm(index, elastic, monkeypatch):
    index.set_search("sq")
    real = cache.read_cache

    def overtaken(folder, manifest, entry):
        monkeypatch.setattr(cache, "read_cache", real)
        index.set_search("hnsw")
        index.compact()  # removes the file
        return real(folder, manifest, entry)

    monkeypatch.setattr(cache, "read_cache", overtaken)
    retriever = Retriever.open(index.path, encoder=elastic)
    assert retriever.generation == index.generation
    assert retriever._gallery.vectors._kind is KINDS["hnsw"]


def test_compaction_builds_the_index_again(index, elastic):
    index.set_search("sq")
    index.delete(range(400))
    index.compact()
    search = Retriever.open(index.path, encoder=elastic)._gallery.vectors
    assert isinstance(search, ApproximateSearch)
    assert len(search._new) == 0


def test_after_many_deletions_it_is_built_again_once(index, tmp_path, elastic, picture, monkeypatch):
    index.set_search("sq")
    built, real = [], cache.build
    monkeypatch.setattr(
        cache, "build", lambda kind, rows, **named: built.append(len(rows)) or real(kind, rows, **named)
    )
    live = index.info().items
    index.delete(range(live // 5))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        index.ingest(tmp_path / f"{number}.png", encoder=elastic)
    assert built == [live - live // 5 + 1]
    assert (index.info().index_type, index.verify()) == ("sq", [])


def test_an_ingest_that_is_given_a_type_builds_that_one_only(index, tmp_path, elastic, picture, monkeypatch):
    index.set_search("hnsw")
    with index._writing() as writer:
        add(writer, 500, seed=3)
    built, real = [], cache.build

    def build(kind, rows, **named):
        built.append(kind)
        return real(kind, rows, **named)

    monkeypatch.setattr(cache, "build", build)
    (tmp_path / "1.png").write_bytes(picture(1))
    index.ingest(tmp_path / "1.png", encoder=elastic, index_type="sq")
    assert (built, index.info().index_type) == ([cache.KINDS["sq"]], "sq")
    assert index.set_search("sq").index_type == "sq"
    assert len(built) == 1
    with pytest.raises(IngestError, match="'tree' is no index type"):
        index.ingest(tmp_path / "1.png", index_type="tree")


def test_building_does_not_copy_the_vectors(monkeypatch):
    monkeypatch.setattr(backends.build, "_TRAINING", 1000)
    monkeypatch.setattr(backends.build, "_HELD_OUT", 20)
    monkeypatch.setattr(backends.build, "_BLOCK", 1000)
    vectors = np.random.default_rng(0).standard_normal((30_000, 192), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    raw = MappedRows([(vectors, np.arange(len(vectors)))], dim=192)
    tracemalloc.start()
    try:
        assert build(KINDS["sq"], raw, progress=silent) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < vectors.nbytes / 2


def test_a_cache_that_the_disk_refuses_is_one_sentence_and_leaves_nothing(index, monkeypatch):
    real = faiss.PyCallbackIOWriter
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(cache.faiss, "PyCallbackIOWriter", lambda write: real(full.write))
        with pytest.raises(IngestError, match="No space left on device") as caught:
            index.set_search("sq")
    assert "\n" not in str(caught.value)
    assert list((index.path / "cache").iterdir()) == []
    assert (index.info().index_type, index.verify()) == ("exact", [])


def test_what_was_asked_for_is_heeded_again_when_the_index_grows_or_shrinks(index):
    assert index.set_search("auto", max_ram=100_000).index_type == "exact"
    with index._writing() as writer:
        add(writer, 1000, seed=3)
    index.compact()
    info = index.info()
    assert (info.index_type, info.index_reason) == ("sq", "2,500 vectors, 0.0 MB of 0.1 MB allowed")
    generation = index.generation
    index.compact()
    assert index.generation == generation
    index.delete(range(1600))
    index.compact()
    assert (index.info().index_type, index.verify()) == ("exact", [])
    with index._writing() as writer:
        add(writer, 1000, seed=4)
    index.compact()
    assert index.info().index_type == "sq"


@pytest.mark.parametrize("asked", ["auto", *KINDS])
def test_nothing_is_trained_below_the_bound_from_which_recall_is_measured(tmp_path, elastic, monkeypatch, asked):
    def train(*arguments, **named):
        pytest.fail("faiss and torch in one process have aborted while training on few vectors")

    monkeypatch.setattr(cache, "build", train)
    index = Index.create(tmp_path / "photos.index", encoder=elastic)
    with index._writing() as writer:
        add(writer, LEAST_ROWS - 1, seed=1)
    assert index.set_search(asked, max_ram=1).index_type == "exact"
    index.compact()
    assert f"needs {LEAST_ROWS:,} pictures to measure its recall with" in index.info().index_reason


def test_an_approximate_index_lies_below_a_folder_of_any_name(index, elastic):
    index.set_search("sq")
    moved = index.path.rename(os.fsdecode(os.fsencode(index.path.parent) + b"/\xff.index"))
    assert len(Retriever.open(moved, encoder=elastic)) == index.info().items  # would warn if it did not read the cache
    assert Index.open(moved).verify() == []


def test_a_type_whose_recall_is_too_low_is_tried_again_only_when_it_is_asked_for_again(index, monkeypatch):
    tried = []
    monkeypatch.setattr(cache, "build", lambda *arguments, **named: tried.append(arguments))
    for _ in range(2):
        info = index.set_search("sq")
        assert info.index_type == "exact"
        assert info.index_reason == "sq was left: recall@10 stays under 0.99 (as asked)"
        index.compact()
    assert len(tried) == 2


def test_repair_and_the_next_writer_replace_a_cache_that_faiss_cannot_read_though_its_sha256_is_right(index):
    for mend in (lambda: Index.repair(index.path).whole, lambda: index.set_search("sq").recall_at_10):
        index.set_search("sq")
        manifest = index._snapshot.manifest
        file = index.path / "cache" / manifest.approximate.file
        data = b"no faiss index"
        file.write_bytes(data)
        entry = manifest.approximate.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        with index._writing() as writer:
            writer.publish_search("sq", reason="as asked", asked=manifest.asked, approximate=entry)
        [problem] = index.verify()
        assert "no index that this faiss reads" in problem
        assert mend()
        assert index.verify() == []


@pytest.mark.parametrize("limit", [-1, 2**62, float("nan"), True, "1 GB", [1]])
def test_a_limit_that_is_no_number_of_bytes_is_one_sentence(index, limit):
    with pytest.raises(IngestError, match="is no number of bytes"):
        index.set_search("auto", max_ram=limit)


def test_an_unknown_type_is_one_sentence(index):
    with pytest.raises(IngestError, match="auto, exact, hnsw, ivfpq, sq"):
        index.set_search("flat")
