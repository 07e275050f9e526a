"""Search on a GPU, as far as a machine without one can tell: faiss's functions for it are stood in for by its CPU's."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from retrieval import Index, Retriever, SearchError
from retrieval.backends.gpu import gpu_knn
from retrieval.flat import FlatSearch

DIM = 16


class FakeResources:
    """Of two GPUs."""


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; gives the list of what was copied to which, with whose resources."""
    copied = []

    def copy(resources, device, index):
        copied.append((type(resources), device))
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    for name, fake in (("StandardGpuResources", FakeResources), ("index_cpu_to_gpu", copy)):
        monkeypatch.setattr(faiss, name, fake, raising=False)  # faiss-cpu has none
    return copied


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("k", [1, 30, 2999])
def test_answers_are_those_of_the_cpu_ties_included(gpus, batch, k):
    assert_as_on_the_cpu(batch, k)
    assert gpus == [(FakeResources, 0)]


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="faiss sees no GPU")
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("k", [1, 30, 2999])
def test_answers_of_a_real_gpu_are_those_of_the_cpu_ties_included(batch, k):
    assert_as_on_the_cpu(batch, k)


def assert_as_on_the_cpu(batch, k):
    random = np.random.default_rng(0)
    pool = random.standard_normal((60, DIM)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    vectors, ids = pool[random.integers(0, 60, 3000)], random.permutation(3000)
    here = FlatSearch(ids, [vectors], dim=DIM)
    there = FlatSearch(ids, [vectors], dim=DIM, elsewhere=gpu_knn)
    for one, other in zip(here.search(pool[:batch], k=k), there.search(pool[:batch], k=k), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_a_retriever_searches_on_the_gpu_that_it_was_opened_for_also_after_a_reload(
    gpus, tmp_path, photos, elastic, picture
):
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    retriever = Retriever.open(index.path, encoder=elastic, search_device="cuda:1")
    (photos / "new.png").write_bytes(picture(77))
    index.ingest(photos)
    retriever.reload()
    assert retriever.search(photos / "new.png", k=1)[0].path.name == "new.png"
    assert gpus == [(FakeResources, 1), (FakeResources, 1)]


def test_resources_can_be_shared(gpus):
    class Shared(FakeResources):
        pass

    gpu_knn(np.ones((2, DIM), dtype=np.float32), resources=Shared())
    assert gpus == [(Shared, 0)]


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda:2", "search_device 'cuda:2': faiss sees 2 GPUs; search on 'cpu', or"),
        ("gpu", "search_device: 'gpu' is no device; give 'cpu', 'cuda' or 'cuda:1'"),
        (0, "search_device: 0 is no device; give"),
    ],
)
def test_a_device_that_is_none_is_one_sentence(gpus, tmp_path, photos, elastic, device, sentence):
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    with pytest.raises(SearchError) as caught:
        Retriever.open(index.path, search_device=device)
    assert str(caught.value).startswith(sentence)
