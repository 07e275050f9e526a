"""Thread counts are decided in one place, for all that shares the cores."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import faiss
import pytest
import torch

from matvit import threads


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("5,2", 5), ("0", None), ("many", None), (None, None)])
def test_omp_num_threads_says_how_many_compute(monkeypatch, asked, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads.computing_threads() == (expected or threads.usable_cores())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_only_cores_that_the_process_may_run_on_are_counted():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert threads.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("computing", "batches", "each"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (16, 4, 4)])
def test_batches_at_once_share_the_threads(monkeypatch, computing, batches, each):
    monkeypatch.setenv("OMP_NUM_THREADS", str(computing))
    assert (threads.batches_at_once(), threads.threads_of_each()) == (batches, each)


@pytest.mark.parametrize(("library", "count"), [("torch", torch.get_num_threads), ("faiss", faiss.omp_get_max_threads)])
def test_threads_are_limited_and_given_back(library, count):
    before = count()
    with threads.limited(library, before + 2):
        assert count() == before + 2
    assert count() == before


def test_a_thread_that_is_started_meanwhile_is_limited_too():
    with threads.limited("torch", 3), ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_a_library_that_is_not_loaded_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    before = torch.get_num_threads()
    with threads.limited("torch", before + 1):
        assert torch.get_num_threads() == before
