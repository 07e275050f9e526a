"""Threads of several processes search while one writer publishes, deletes, compacts: each sees one whole generation.

`make soak` writes for longer: MATVIT_SOAK_ROUNDS.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval import Index, writer
from retrieval.backends import choice
from retrieval.snapshot import Snapshot
from retrieval.writer import Entry

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
ROUNDS = int(os.environ.get("MATVIT_SOAK_ROUNDS", "5"))
SHARD = int(os.environ.get("MATVIT_SOAK_SHARD", "0"))
READERS = 2
SEARCHES = ("sq", "hnsw", "exact")


@pytest.fixture
def published(monkeypatch):
    """What each generation that the test publishes holds: its ids, by its number."""
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)  # so few are searched approximately, too
    held = {}
    publish = writer.publish_manifest

    def record(folder, manifest):
        pointer = publish(folder, manifest)
        segments = Snapshot.open(folder).segments
        held[manifest.generation] = sorted(int(i) for s in segments for i in s.row_ids[s.live_rows()])
        return pointer

    monkeypatch.setattr(writer, "publish_manifest", record)
    return held


def add(index, count):
    with index._writing() as opened:
        start = opened.manifest.next_id
        entries = [
            Entry(item=HELPERS["item_of"](number), embedding=HELPERS["vector_of"](number), replaces=None)
            for number in range(start, start + count)
        ]
        opened.publish(entries, deleted={}, roots={"root": "/photos"}, next_id=start + count)


def write(index, chance, round_number):
    """One round of everything that changes an index."""
    add(index, chance.randrange(1, 60))
    held = sorted(
        set(range(1, index._snapshot.manifest.next_id)) & {i for s in index._snapshot.segments for i in ids(s)}
    )
    index.delete(chance.sample(held, min(len(held), chance.randrange(1, 40))))
    if round_number % 2:
        index.set_search(SEARCHES[round_number // 2 % len(SEARCHES)])
    if round_number % 3 == 2:
        index.compact()


def ids(segment):
    return segment.row_ids[segment.live_rows()].tolist()


def test_every_answer_is_of_one_whole_generation(tmp_path, elastic, published):
    index, stop, chance = (
        Index.create(tmp_path / "shared.index", encoder=elastic),
        tmp_path / "stop",
        random.Random(SHARD),
    )
    add(index, 200)
    command = [sys.executable, str(Path(__file__).with_name("readers.py")), str(index.path), str(stop)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(READERS)]
    try:
        assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * READERS
        for round_number in range(ROUNDS):
            write(index, chance, round_number)
    finally:
        stop.touch()
        answers = [reader.communicate(timeout=60)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * READERS
    for answer in map(json.loads, answers):
        assert {int(generation): sets for generation, sets in answer.items()} == {
            int(generation): [published[int(generation)]] for generation in answer
        }
        assert int(max(answer, key=int)) == index.generation
    assert len({generation for answer in answers for generation in json.loads(answer)}) > 2
    assert index.verify() == []
