"""The submodel by what it may cost and must find: the best within the limits, or a sentence naming the nearest."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrieval.latency
from matvit.pareto import EncoderChoice, pareto_front
from retrieval import Blend, Index, Retriever, SearchError
from retrieval.choosing import Limits, choose
from retrieval.latency import latency_ms

FLOPS = {"S": 0.4, "M": 0.5, "L": 0.7, "XL": 1.0}
RECALL = {"S": 0.5, "M": 0.72, "L": 0.79, "XL": 0.8}
MS = {"S": 4.0, "M": 5.0, "L": 7.0, "XL": 10.0}


def choice(spec, flops, recall):
    return EncoderChoice(spec=spec, relative_flops=flops, recall=recall)


shares = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(
    rows=st.lists(st.tuples(shares, shares, st.integers(1, 9)), min_size=1, max_size=6),
    max_latency_ms=st.none() | st.integers(1, 9),
    min_recall=st.none() | shares,
)
def test_nothing_within_the_limits_is_better_than_what_is_chosen(rows, max_latency_ms, min_recall):
    choices = [choice(str(number), flops, recall) for number, (flops, recall, _) in enumerate(rows)]
    front = pareto_front(choices)
    recall, cost, time = ({str(n): row[i] for n, row in enumerate(rows)} for i in (1, 0, 2))
    limits = Limits(max_latency_ms=max_latency_ms, min_recall=min_recall)
    full = choice("XL", 1.0, 1.0)
    least = min_recall if min_recall is not None else 0.98 if max_latency_ms is None else 0
    allowed = [one.spec for one in front if one.recall >= least and time[one.spec] <= (max_latency_ms or math.inf)]
    if not allowed:
        with pytest.raises(SearchError):
            choose(front, limits, full=full, latency=time.__getitem__)
        return
    chosen = choose(front, limits, full=full, latency=time.__getitem__)
    assert chosen in allowed
    if max_latency_ms is None:
        assert cost[chosen] == min(cost[spec] for spec in allowed)
    else:
        assert recall[chosen] == max(recall[spec] for spec in allowed)


@pytest.fixture
def retriever(tmp_path, photos, elastic, monkeypatch):
    """Its table has RECALL, and its submodels take MS; `measured` lists those that were measured."""
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    elastic.pareto = tuple(
        {"spec": spec, "relative_flops": FLOPS[spec], "quality": {"recall@1": RECALL[spec]}} for spec in FLOPS
    )
    index = Index.build(photos, encoder=elastic, path=tmp_path / "photos.index")
    return Retriever.open(index.path, encoder=elastic)


@pytest.fixture
def measured(monkeypatch):
    specs = []

    def measure(encoder):
        specs.append(str(encoder.spec))
        return MS[str(encoder.spec)]

    monkeypatch.setattr(retrieval.latency, "_measured", measure)
    return specs


@pytest.mark.parametrize(
    ("asked", "spec", "timed"),
    [
        ({}, "XL", []),
        ({"encoder": "auto"}, "L", []),  # 0.98 of 0.8
        ({"min_recall": 0.9}, "M", []),
        ({"min_recall": 0.9, "encoder": "auto"}, "M", []),
        ({"min_recall": 0}, "S", []),
        ({"max_latency_ms": 5.5}, "M", ["XL", "L", "M"]),
        ({"max_latency_ms": 100}, "XL", ["XL"]),
        ({"max_latency_ms": 8, "min_recall": 0.5}, "L", ["XL", "L"]),
    ],
)
def test_the_limits_choose_the_encoder_and_the_hits_say_which(retriever, photos, measured, asked, spec, timed):
    assert retriever.search(photos / "1.png", **asked).spec == spec
    assert measured == timed
    assert retriever.search(Blend([photos / "1.png", photos / "2.png"]), **asked).spec == spec
    assert measured == timed


def test_a_time_is_measured_once_on_a_machine(retriever, photos, elastic, measured, tmp_path):
    retriever.search(photos / "1.png", max_latency_ms=5.5)
    again = Retriever.open(retriever.path, encoder=elastic)
    assert again.search(photos / "1.png", max_latency_ms=5.5).spec == "M"
    assert measured == ["XL", "L", "M"]
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_text("{")  # damaged: measured again
    Retriever.open(retriever.path, encoder=elastic).search(photos / "1.png", max_latency_ms=100)
    assert measured == ["XL", "L", "M", "XL"]


def test_a_time_is_measured_again_after_a_day(retriever, photos, measured, monkeypatch):
    now = [1e9]
    clock = SimpleNamespace(time=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(retrieval.latency, "time", clock)
    for hours, times in ((0, 1), (23, 1), (25, 2), (48, 2), (1, 3)):  # and where the clock was set back
        now[0] = 1e9 + 3600 * hours
        assert Retriever.open(retriever.path, encoder=retriever.encoder).search(photos / "1.png", max_latency_ms=100)
        assert measured == ["XL"] * times, hours


def test_who_asks_for_an_encoder_is_told_which_submodel_is_timed_while_it_is(retriever, measured):
    told = []
    for _ in range(2):  # then the times are known
        retriever.query_encoder(max_latency_ms=5.5, progress=told.append)
    assert [(event.done, event.note) for event in told] == [(1, "XL"), (2, "L"), (3, "M")]


def test_what_limits_choose_is_looked_up_once_whoever_is_told_of_it(retriever, measured, monkeypatch):
    chosen, choose = [], retrieval.choosing.choose
    monkeypatch.setattr(
        retrieval.choosing, "choose", lambda *given, **named: chosen.append(1) or choose(*given, **named)
    )
    for _ in range(3):
        retriever.query_encoder(min_recall=0.9, progress=lambda event: None)
    assert chosen == [1]


def test_searches_that_begin_together_do_not_measure_against_each_other(elastic, tmp_path, monkeypatch):
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    measured = []

    def slowly(encoder):
        measured.append(str(encoder.spec))
        time.sleep(0.05)
        return 1.0

    monkeypatch.setattr(retrieval.latency, "_measured", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: latency_ms(elastic.encoder(), elastic=elastic), range(4))) == [1.0] * 4
    assert measured == ["XL"]


def test_a_time_counts_for_the_threads_and_the_processor_that_it_was_measured_on(
    elastic, tmp_path, monkeypatch, measured
):
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    for name, value in (
        ("computing_threads", lambda: 2),
        ("computing_threads", lambda: 3),
        ("_processor", lambda: "another"),
    ):
        monkeypatch.setattr(retrieval.latency, name, value)
        for _ in range(2):
            latency_ms(elastic.encoder(), elastic=elastic)
    assert measured == ["XL"] * 3


def test_a_busy_moment_does_not_count_and_deleting_the_file_measures_again(elastic, tmp_path, monkeypatch):
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path / "cache"))
    clock = iter([0, 5, 5, 5.004] + 100 * [9, 20])  # seconds: the machine is at rest in the second round alone
    monkeypatch.setattr(retrieval.latency, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=time.time))
    encoder = elastic.encoder()
    times = [latency_ms(encoder, elastic=elastic) for _ in range(2)]
    [kept] = (tmp_path / "cache").glob("latency-*.json")
    kept.unlink()
    assert [*times, latency_ms(encoder, elastic=elastic)] == pytest.approx([4, 4, 11_000])


def test_a_real_measurement_is_a_time(retriever, photos):
    assert retriever.search(photos / "1.png", max_latency_ms=10_000).spec == "XL"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"max_latency_ms": 2}, "search: no submodel takes 2 ms or less here; allow more: S takes 4.0 ms"),
        (
            {"max_latency_ms": 5, "min_recall": 0.95},
            "search: no submodel with 95.0% of XL's recall takes 5 ms or less here; allow more: L takes 7.0 ms",
        ),
        ({"max_latency_ms": 0}, "search: max_latency_ms is 0; give a time above 0 ms"),
        ({"max_latency_ms": math.nan}, "search: max_latency_ms is nan; give"),
        ({"min_recall": 98}, "search: min_recall is 98; give a share of XL's recall, from 0 to 1"),
        ({"min_recall": 0.9, "encoder": "S"}, "search: an encoder and limits are both given; leave out one"),
    ],
)
def test_limits_that_cannot_be_kept_or_meant_are_one_sentence(retriever, photos, measured, asked, sentence):
    with pytest.raises(SearchError) as caught:
        retriever.search(photos / "1.png", **asked)
    assert str(caught.value).startswith(sentence)


def test_without_a_table_there_is_nothing_to_choose_by(retriever, photos, elastic):
    elastic.pareto = ()
    with pytest.raises(SearchError, match="does not tell its submodels' recall; name an encoder, or measure them"):
        retriever.search(photos / "1.png", encoder="auto")


def test_a_table_without_xl_says_nothing_of_shares_of_xls_recall(retriever, photos, elastic):
    elastic.pareto = tuple(row for row in elastic.pareto if row["spec"] != "XL")
    for asked in ({"encoder": "auto"}, {"min_recall": 0.5}):
        with pytest.raises(SearchError, match=r"does not tell XL's recall.*measure the table again: matvit eval"):
            retriever.search(photos / "1.png", **asked)


def test_the_query_encoder_is_the_one_that_a_search_uses(retriever, picture):
    for asked in ({}, {"encoder": "M"}, {"max_latency_ms": 6}, {"encoder": "auto"}):
        assert str(retriever.query_encoder(**asked).spec) == retriever.search(picture(1), **asked).spec
    with pytest.raises(SearchError, match="an encoder and limits are both given"):
        retriever.query_encoder("M", max_latency_ms=6)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 25), (0.3, 4), (5.0, 3)])
def test_a_slow_submodel_is_timed_for_about_a_second(monkeypatch, seconds, rounds):
    clock = [0.0]

    class Slow:
        asked = 0

        def embed(self, pictures):
            self.asked += 1
            clock[0] += seconds

    monkeypatch.setattr("retrieval.latency.time.perf_counter", lambda: clock[0])
    slow = Slow()
    assert retrieval.latency._measured(slow) == pytest.approx(1000 * seconds)
    assert slow.asked == rounds


def test_a_pipe_in_the_place_of_the_times_is_not_waited_for(tmp_path, elastic, monkeypatch):
    monkeypatch.setenv("MATVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(retrieval.latency, "_measured", lambda encoder: 3.0)
    encoder = elastic.encoder()
    os.mkfifo(retrieval.latency._file(encoder, elastic))
    assert latency_ms(encoder, elastic=elastic) == 3.0
