"""Thread counts are decided in one place, for all that shares the cores."""

from __future__ import annotations

import os

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


@pytest.mark.parametrize(("computing", "each"), [(1, 1), (2, 1), (4, 1), (16, 4)])
def test_batches_at_once_share_the_threads_and_give_them_back(monkeypatch, computing, each):
    monkeypatch.setenv("OMP_NUM_THREADS", str(computing))
    before = torch.get_num_threads()
    with threads.sharing(threads.batches_at_once()):
        assert torch.get_num_threads() == each
    assert torch.get_num_threads() == before
