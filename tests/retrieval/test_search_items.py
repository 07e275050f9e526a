"""Pictures of the index as queries: nothing is encoded, and the answer is that of their files."""

from __future__ import annotations

import pytest

from retrieval import Index, Retriever
from retrieval.errors import SearchError


@pytest.fixture
def retriever(tmp_path, photos, elastic):
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    return Retriever.open(index.path, encoder=elastic)


def test_an_item_finds_what_its_file_finds(retriever):
    paths = retriever.paths()
    assert len(paths) == len(retriever)
    by_item = retriever.search_items(paths, k=4)
    by_file = retriever.search_many(list(paths.values()), k=4)
    for number, item, file in zip(paths, by_item, by_file, strict=True):
        assert [hit.id for hit in item] == [hit.id for hit in file]
        assert [hit.score for hit in item] == pytest.approx([hit.score for hit in file], abs=1e-6)
        assert (item[0].id, item.query, item.runtime) == (number, str(paths[number]), "index")


def test_an_item_that_is_not_there_is_refused(retriever):
    assert retriever.search_items([]) == []
    with pytest.raises(SearchError, match="no picture with id 10000"):
        retriever.search_items([10000])
    with pytest.raises(SearchError, match="k is 0"):
        retriever.search_items([next(iter(retriever.paths()))], k=0)
