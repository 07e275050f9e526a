"""One index, any submodel: what a search gives, and what it refuses."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import matvit
from matvit import CheckpointError, ImageError, SpecError
from retrieval import EncoderMismatchError, Hits, Index, IndexFormatError, Retriever, SearchError
from retrieval.gallery import Gallery


@pytest.fixture
def index(tmp_path, photos, elastic):
    return Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")


@pytest.fixture
def retriever(index, elastic):
    return Retriever.open(index.path, encoder=elastic)


@pytest.mark.parametrize("spec", ["S", "M", "L", "XL", "1S.1XL"])
def test_every_submodel_searches_the_one_index(retriever, photos, spec):
    for number in range(7):
        hits = retriever.search(photos / f"{number}.png", encoder=spec, k=3)
        assert hits.spec == spec
        assert hits[0].path == photos / f"{number}.png"
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert 1.0 >= hits[0].score >= hits[1].score >= hits[2].score >= -1.0


def test_an_index_and_a_retriever_show_in_one_line_what_they_are(index, retriever):
    index.delete(0)
    made = f"made by {retriever.encoder.name}, XL at {retriever.encoder.shape.image_size} px>"
    assert repr(index) == f"<Index {index.path}: {index.info().items} pictures, generation 3, {made}"
    assert repr(retriever) == f"<Retriever {index.path}: {len(retriever)} pictures, generation 2, {made}"
    assert len(retriever) == index.info().items + 1


def test_hits_say_how_they_were_found(retriever, photos):
    hits = retriever.search(str(photos / "1.png"), encoder="m", k=2)
    assert (hits.query, hits.spec, hits.runtime, hits.generation) == (str(photos / "1.png"), "M", "numpy", 2)
    parts = hits.latency_ms.preprocess, hits.latency_ms.encode, hits.latency_ms.search
    assert all(part > 0 for part in parts)
    assert hits.latency_ms.total == pytest.approx(sum(parts))
    assert hits[-1] in hits
    assert [hit.id for hit in hits[:1]] == [hits[0].id]
    with pytest.raises(FrozenInstanceError):
        hits.spec = "S"


def test_paths_bytes_and_pil_images_find_the_same(retriever, photos, picture):
    opened = Image.open(io.BytesIO(picture(4)))
    by_path, by_bytes, by_image = (retriever.search(q).hits for q in (photos / "4.png", picture(4), opened))
    assert by_path == by_bytes == by_image


def test_a_batch_equals_its_queries_alone(retriever, photos):
    queries = sorted(photos.glob("*.png"))
    together = retriever.search_many(queries, encoder="S", k=4, batch_size=3)
    assert len(together) == 7
    for query, hits in zip(queries, together, strict=True):
        assert hits.query == str(query)
        alone = retriever.search(query, encoder="S", k=4)
        assert [hit.id for hit in hits] == [hit.id for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-6)


def test_a_large_k_gives_all_there_is_and_an_empty_index_gives_nothing(tmp_path, retriever, elastic, picture):
    assert len(retriever.search(picture(1), k=1000)) == 10
    Index.create(tmp_path / "empty", encoder=elastic)
    hits = Retriever.open(tmp_path / "empty", encoder=elastic).search(picture(1))
    assert isinstance(hits, Hits)
    assert len(hits) == 0
    assert hits.spec == "XL"


def test_scores_are_cosines_also_for_a_runtime_that_rounds(tmp_path, photos, elastic, picture):
    class Rounding(type(elastic.encoder())):
        def encode(self, pixels):
            return np.float32(1.0009) * super().encode(pixels)

    class Elastic(type(elastic)):
        def encoder(self, spec=None):
            return Rounding(self.shape.spec(spec), self.space_id)

    Index.build(photos, encoder=elastic, path=tmp_path / "exact")
    Index.build(photos, encoder=Elastic(), path=tmp_path / "rounded")
    exact = Retriever.open(tmp_path / "exact", encoder=elastic).search(picture(1))
    rounded = Retriever.open(tmp_path / "rounded", encoder=Elastic()).search(picture(1))
    assert [hit.score for hit in rounded] == pytest.approx([hit.score for hit in exact], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"k": 0}, SearchError, "search: k is 0; give a k from 1 to 9223372036854775807"),
        ({"k": 2.5}, SearchError, "search: k is 2.5; give"),
        ({"k": float("nan")}, SearchError, "search: k is nan; give"),
        ({"k": "3"}, SearchError, "search: k is '3'; give"),
        ({"min_score": 1.5}, SearchError, "search: min_score is 1.5; give a number from -1 to 1"),
        ({"k": True}, SearchError, "search: k is True; give"),
        ({"image": None}, SearchError, "search: a NoneType is no picture; give a path"),
        ({"image": True}, SearchError, "search: a bool is no picture; give a path"),
        ({"image": []}, SearchError, "search: a list is no picture; give a path"),
        ({"encoder": "Q"}, SpecError, "encoder spec: 'Q' is not a submodel spec; use"),
        ({"encoder": "5S"}, SpecError, "encoder spec: '5S' covers more than the encoder's 2 blocks; use"),
        ({"image": "missing.png"}, ImageError, "missing.png: no such file; give"),
        ({"image": b"text"}, ImageError, "picture: not a picture in a supported format; give"),
    ],
)
def test_bad_input_is_one_sentence(retriever, picture, arguments, kind, sentence):
    arguments = {"image": picture(1), **arguments}
    with pytest.raises(kind) as caught:
        retriever.search(arguments.pop("image"), **arguments)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_an_integer_of_numpys_is_a_k(retriever, picture):
    assert len(retriever.search(picture(1), k=np.int64(3))) == 3


def test_one_picture_is_not_taken_for_many(retriever, photos, picture):
    for one in (photos / "1.png", str(photos / "1.png"), picture(1), Image.open(io.BytesIO(picture(1)))):
        with pytest.raises(SearchError, match="is no list; give a list"):
            retriever.search_many(one)


def test_no_index_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")  # may not be looked into, not even by root
    (tmp_path / "half" / "generations").mkdir(parents=True)
    for name, what in (
        ("none", "no such index"),
        (".", "holds no index"),
        ("half", "holds no index"),
        ("file", "is a file, not an index"),
        ("loop", r"loop: cannot be read \(Too many levels of symbolic links\); check"),
    ):
        with pytest.raises(IndexFormatError, match=what):
            Retriever.open(tmp_path / name)


@pytest.mark.parametrize("path", [None, 5, b"x", "a\0b", "\ud800"])
def test_what_is_no_folders_name_is_no_index(elastic, path):
    for attempt in (Index.open, Index.repair, Retriever.open, lambda path: Index.create(path, encoder=elastic)):
        with pytest.raises(IndexFormatError, match="is no folder's name; give a text or a Path"):
            attempt(path)


@pytest.mark.parametrize("url", ["s3://bucket/index", "file:///tmp/index", Path("https://host/index")])
def test_a_url_is_no_index_and_no_folder_is_made_of_its_name(elastic, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for attempt in (Index.open, Index.repair, Retriever.open, lambda path: Index.create(path, encoder=elastic)):
        with pytest.raises(IndexFormatError, match="is a URL, but an index lies in a folder of this computer"):
            attempt(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [["label"], {"label"}, 5, None])
def test_what_is_no_metadata_name_has_no_values(retriever, name):
    with pytest.raises(SearchError, match="is no metadata name; give a text, such as 'label'"):
        retriever.values(name)


def test_submodels_are_extracted_once(retriever, elastic, picture):
    before = elastic.extracted
    for _ in range(3):
        retriever.search(picture(1), encoder="S")
        retriever.search(picture(1), encoder="2S")  # the same function
    assert elastic.extracted == before + 1


def test_rarely_used_submodels_are_let_go(retriever, elastic, picture):
    for width in range(1, 10):
        retriever.search(picture(1), encoder=f"2w{width + 20}")
    before = elastic.extracted
    retriever.search(picture(1), encoder="2w29")
    assert elastic.extracted == before
    retriever.search(picture(1), encoder="2w21")
    assert elastic.extracted == before + 1


def test_a_foreign_encoder_is_accepted_by_space_and_refused_by_name(index, elastic, picture):
    retriever = Retriever.open(index.path)  # the encoder that built it is never needed
    foreign = replace(elastic.encoder("M"), runtime="elsewhere")
    assert retriever.search(picture(2), encoder=foreign).runtime == "elsewhere"
    for refused in (
        lambda: retriever.search(picture(2), encoder=replace(foreign, space_id="b" * 64)),
        lambda: Retriever.open(index.path, encoder=replace(elastic, space_id="b" * 64)),
    ):
        with pytest.raises(EncoderMismatchError, match=r"bbbbbbbbbbbb.*555555555555"):
            refused()


def test_the_encoder_that_built_the_index_is_found(index, elastic, picture, monkeypatch):
    class Loader:
        @staticmethod
        def from_pretrained(source, *, revision):
            assert (source, revision) == ("fake-source", "fake-commit")
            return elastic

    monkeypatch.setitem(matvit.__dict__, "MatViT", Loader)
    assert len(Retriever.open(index.path).search(picture(1), encoder="S")) == 10


def test_an_encoder_that_cannot_be_found_is_named(index, elastic, picture, monkeypatch, tmp_path, photos):
    class Loader:
        @staticmethod
        def from_pretrained(source, *, revision):
            raise CheckpointError(what="no such folder", where=source, fix="look")

    monkeypatch.setitem(matvit.__dict__, "MatViT", Loader)
    with pytest.raises(CheckpointError, match=r"from 'fake-source' \(no such folder\); put it back"):
        Retriever.open(index.path).search(picture(1))
    Index.build(photos, encoder=replace(elastic, source=None), path=tmp_path / "unsaved")
    (photos / "new.png").write_bytes(picture(70))
    with pytest.raises(CheckpointError, match="'fake' that built this index was never saved; pass encoder="):
        Index.open(tmp_path / "unsaved").ingest(photos)


def test_a_reader_stays_on_its_generation_until_it_reloads(index, retriever, photos, picture):
    (photos / "new.png").write_bytes(picture(70))
    (photos / "0.png").unlink()
    index.ingest(photos, delete=True)
    stale = retriever.search(picture(70), k=99)
    assert (stale.generation, stale[0].path.name == "new.png", len(stale)) == (2, False, 10)
    assert any(hit.path.name == "0.png" for hit in stale)
    assert retriever.reload() == 3
    fresh = retriever.search(picture(70), k=99)
    assert (fresh.generation, fresh[0].path.name, len(fresh)) == (3, "new.png", 10)


def test_a_reload_without_news_reads_nothing_again(index, retriever, monkeypatch):
    monkeypatch.setattr(Gallery, "open", None)
    assert retriever.reload() == index.generation == 2


def test_an_index_that_was_replaced_by_another_encoders_is_noticed(index, retriever, elastic, photos, picture):
    shutil.rmtree(index.path)
    Index.build(photos, encoder=elastic.in_another_space(), path=index.path)
    with pytest.raises(EncoderMismatchError):
        index.ingest(photos)
    with pytest.raises(EncoderMismatchError):
        retriever.reload()
    assert retriever.search(picture(1))[0].path.name == "1.png"


@pytest.fixture
def loads(elastic, monkeypatch):
    """The sources that encoders are loaded by, of two encoders: "fake-source" and "other-source"."""
    encoders = {elastic.source: elastic, "other-source": replace(elastic.in_another_space(), source="other-source")}

    class Loads(list):
        pass

    found = Loads()
    found.encoders, found.other = encoders, encoders["other-source"]

    class Loader:
        @staticmethod
        def from_pretrained(source, *, revision):
            found.append(source)
            return encoders[source]

    monkeypatch.setitem(matvit.__dict__, "MatViT", Loader)
    return found


def test_an_index_replaced_while_its_encoder_is_loaded_never_answers_from_the_wrong_space(
    index, elastic, photos, picture, monkeypatch
):
    other = elastic.in_another_space()

    class Loader:
        @staticmethod
        def from_pretrained(source, *, revision):
            if replaced:
                return other
            shutil.rmtree(index.path)
            replaced.append(Index.build(photos, encoder=other, path=index.path))
            retriever.reload()
            return elastic

    replaced = []
    monkeypatch.setitem(matvit.__dict__, "MatViT", Loader)
    retriever = Retriever.open(index.path)
    assert retriever.search(picture(1), encoder="S")[0].path.name == "1.png"
    assert retriever.search(picture(1), encoder="S")[0].path.name == "1.png"
    assert retriever.encoder is other


def test_a_search_that_began_before_a_reload_ends_with_its_own_generation_and_encoder(index, loads, picture):
    def pictures():
        yield from [picture(1)] * 2
        index.upgrade(loads.other)
        retriever.reload()
        later.append(retriever.search(picture(1), encoder="S"))
        yield from [picture(1)] * 2

    retriever, later = Retriever.open(index.path), []
    before = retriever.generation
    begun = retriever.search_many(pictures(), encoder="S", batch_size=1)
    assert [hits[0].path.name for hits in (*begun, *later)] == ["1.png"] * 5
    assert [hits.generation for hits in (*begun, *later)] == [before] * 4 + [index.generation]
    assert loads == ["fake-source", "other-source"]


def test_after_an_upgrade_a_reload_lets_go_of_the_encoder_that_the_retriever_had_loaded(index, loads, picture):
    retriever = Retriever.open(index.path)
    assert retriever.search(picture(1), encoder="S")[0].path.name == "1.png"
    index.upgrade(loads.other)
    retriever.reload()
    assert retriever.search(picture(1), encoder="S").generation == index.generation
    assert retriever.encoder is loads.other


def test_a_reload_takes_an_encoder_that_is_not_loaded_yet_from_where_it_is_now(index, elastic, loads, photos, picture):
    retriever = Retriever.open(index.path)
    index.set_search("exact")
    shutil.rmtree(index.path)
    Index.build(photos, encoder=replace(elastic, source="moved"), path=index.path)
    loads.encoders["moved"] = elastic
    retriever.reload()
    retriever.search(picture(1), encoder="S")
    assert loads == ["moved"]


def test_a_reload_in_the_same_space_keeps_the_encoder(index, elastic, loads, photos, picture):
    retriever = Retriever.open(index.path)
    retriever.search(picture(1), encoder="S")
    (photos / "new.png").write_bytes(picture(77))
    index.ingest(photos, encoder=elastic)
    retriever.reload()
    assert retriever.search(picture(77), encoder="S")[0].path.name == "new.png"
    assert loads == ["fake-source"]


def test_threads_may_share_a_retriever(retriever, photos):
    expected = retriever.search(photos / "1.png", encoder="S").hits
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(retriever.search(photos / "1.png", encoder="S").hits))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8


def test_retrieval_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import retrieval; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("query", [np.zeros((3, 4, 4)), np.array([1]), 1.0, None])
def test_an_array_is_no_query(retriever, query):
    with pytest.raises(SearchError, match="is no picture"):
        retriever.search(query)


@pytest.mark.parametrize(
    "named",
    [
        {"k": np.array([1, 2])},
        {"batch_size": 2**80},
        {"min_score": [1]},
        {"min_score": 1j},
        {"max_latency_ms": [1]},
        {"min_recall": b"1"},
    ],
)
def test_an_argument_of_another_type_is_one_sentence(retriever, named):
    with pytest.raises(SearchError, match=f"{next(iter(named))} is "):
        retriever.search_many([1], **named)


@pytest.mark.parametrize("queries", [None, 3])
def test_what_is_no_list_of_queries_is_one_sentence(retriever, queries):
    with pytest.raises(SearchError, match="is no list"):
        retriever.search_many(queries)


def test_equal_metadata_is_one_text_that_goes_with_its_gallery(tmp_path, photos, elastic):
    shelf = f"a shelf of {tmp_path}"
    lines = [f"{photos / f'{number}.png'},{shelf}" for number in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["path,shelf", *lines]))
    index = Index.build(tmp_path / "list.csv", encoder=elastic, path=tmp_path / "i")
    first, *others = Gallery.open(index.path)._metadata
    assert shelf in first
    assert all(other is first for other in others)
    again = first[:5] + first[5:]
    assert sys.intern(again) is again  # no equal text is interned: it would stay for ever


@pytest.mark.parametrize("number", [[1], True, 1.0])
def test_what_is_no_id_has_no_picture(retriever, number):
    with pytest.raises(SearchError, match="holds no picture with id"):
        retriever.read_picture(number)


def test_a_picture_that_has_changed_is_not_given_as_the_one_that_was_indexed(retriever, photos, picture):
    [hit] = retriever.search(picture(1), k=1)
    indexed = hit.path.read_bytes()
    assert retriever.read_picture(hit.id) == indexed
    hit.path.write_bytes(picture(2))
    with pytest.raises(ImageError, match="has changed since it was indexed; put it back"):
        retriever.read_picture(hit.id)


@pytest.mark.parametrize("encoder", [5, b"S", ["S"]])
def test_what_is_no_encoder_searches_nothing(retriever, picture, encoder):
    with pytest.raises(EncoderMismatchError, match="is no encoder"):
        retriever.search(picture(1), encoder=encoder)


def test_a_whole_encoder_and_a_submodel_are_told_apart_where_the_other_is_needed(retriever, elastic, photos, tmp_path):
    submodel, index = elastic.encoder("S"), Index.open(retriever.path)
    with pytest.raises(EncoderMismatchError, match="is a whole encoder, not one submodel; name a submodel, such as"):
        retriever.search(photos / "1.png", encoder=elastic)
    for needs_a_whole_one in (
        lambda: Index.create(tmp_path / "new.index", encoder=submodel),
        lambda: Retriever.open(retriever.path, encoder=submodel),
        lambda: index.ingest(photos, encoder=submodel),
        lambda: index.upgrade(submodel),
    ):
        with pytest.raises(EncoderMismatchError, match="is one submodel, not a whole encoder; load one"):
            needs_a_whole_one()
    assert not (tmp_path / "new.index").exists()


def test_a_name_is_no_encoder_and_leaves_nothing(retriever, photos, tmp_path):
    with pytest.raises(EncoderMismatchError, match="is no encoder; load one"):
        Retriever.open(retriever.path, encoder="XL")
    with pytest.raises(EncoderMismatchError, match="is no encoder; load one"):
        Index.build(photos, encoder="matvit-small", path=tmp_path / "new.index")
    assert not (tmp_path / "new.index").exists()
