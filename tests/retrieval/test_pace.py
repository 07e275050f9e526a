"""A long run publishes soon at first, then less often."""

from __future__ import annotations

from itertools import pairwise

import pytest

from retrieval import pace


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_the_first_publication_is_after_seconds_and_later_ones_grow_apart_to_a_minute(clock):
    run, moments = pace.Pace(most=10**9), [0.0]
    while clock[0] < 1000 + 3600:
        clock[0] += 0.1
        if run.is_due(1):
            run.published()
            moments.append(clock[0] - 1000)
    waits = [after - before for before, after in pairwise(moments)]
    assert waits[0] == pytest.approx(5, abs=0.2)
    assert all(wait < 0.2 + max(5, moment / 4) for moment, wait in zip(moments, waits, strict=False))
    assert [max(waits), waits[-1]] == pytest.approx([60, 60], abs=0.2)
    assert len(waits) < 3600 / 60 + 20  # segments


def test_many_that_wait_are_published_at_once(clock):
    run = pace.Pace(most=3)
    assert [run.is_due(waiting) for waiting in (0, 2, 3)] == [False, False, True]
