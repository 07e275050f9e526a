"""Any sequence of changes, upgrades and kinds of search answers as a dictionary and a brute-force search do.

`make soak` runs more and longer ones: MATVIT_SOAK_RUNS and MATVIT_SOAK_STEPS.
"""

from __future__ import annotations

import os
import runpy
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from retrieval import Index, Retriever
from retrieval.backends import choice

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
RUNS = int(os.environ.get("MATVIT_SOAK_RUNS", "12"))
STEPS = int(os.environ.get("MATVIT_SOAK_STEPS", "15"))
NAMES = st.sampled_from([f"{name}.png" for name in "abcdefgh"])
SEEDS = st.integers(0, 5)
FSYNC = os.fsync
LEAST_ROWS = choice.LEAST_ROWS
PICTURES = {seed: HELPERS["picture_bytes"](seed) for seed in range(6)}


class IndexMachine(RuleBasedStateMachine):
    """`files`: the folder; `held`: what the index must hold; `seen`: what it held at the retriever's last reload."""

    def __init__(self):
        super().__init__()
        os.fsync = lambda descriptor: None  # nothing is killed here: syncing would only take time
        choice.LEAST_ROWS = 2  # so few are searched approximately, too: one is held out, and finds another
        self.home = Path(tempfile.mkdtemp(prefix="matvit-stateful-"))
        self.photos = self.home / "photos"
        self.photos.mkdir()
        self.elastic = HELPERS["FakeElastic"]()
        self.index = Index.create(self.home / "i", encoder=self.elastic)
        self.retriever = Retriever.open(self.index.path, encoder=self.elastic)
        self.clock = 1
        self.files: dict[str, int] = {}  # name -> seed of its content
        self.held: dict[str, tuple[int, int]] = {}  # name -> id, seed
        self.seen: dict[str, tuple[int, int]] = {}
        self.next_id = 0

    def teardown(self):
        os.fsync = FSYNC
        choice.LEAST_ROWS = LEAST_ROWS
        shutil.rmtree(self.home)

    @rule(name=NAMES, seed=SEEDS)
    def write_file(self, name, seed):
        path = self.photos / name
        path.write_bytes(PICTURES[seed])
        self.clock += 1
        os.utime(path, ns=(self.clock, self.clock))
        self.files[name] = seed

    @rule(name=NAMES)
    def remove_file(self, name):
        if name in self.files:
            (self.photos / name).unlink()
            del self.files[name]

    @rule(delete=st.booleans())
    def ingest(self, delete):
        if not self.files:
            return
        gone = sorted(self.held.keys() - self.files.keys())
        new = sorted(self.files.keys() - self.held.keys())
        self.index.ingest(self.photos, delete=delete)
        info = {path.name: number for number, path in Retriever.open(self.index.path).paths().items()}
        for name, seed in self.files.items():
            if name in self.held:
                assert info[name] == self.held[name][0]  # a changed file keeps its id
            self.held[name] = info[name], seed
        moved = {self.held[name][0] for name in new}
        for name in gone if delete else ():
            assert info.get(name) is None
            del self.held[name]
        fresh = sorted(number for number in moved if number >= self.next_id)
        assert fresh == list(range(self.next_id, self.next_id + len(fresh)))
        self.next_id += len(fresh)
        assert info == {name: number for name, (number, _) in self.held.items()}

    @rule(name=NAMES, by_id=st.booleans())
    def delete(self, name, by_id):
        if name in self.held:
            assert self.index.delete([self.held.pop(name)[0] if by_id else self.photos / name]) == 1
            self.held.pop(name, None)

    @rule()
    def compact(self):
        self.index.compact()

    @rule(index_type=st.sampled_from(["exact", "hnsw", "sq"]))  # ivfpq learns from 16 vectors at least
    def set_search(self, index_type):
        self.index.set_search(index_type)

    @rule()
    def upgrade(self):
        self.elastic = replace(self.elastic, space_id=("a" if self.elastic.space_id[0] == "5" else "5") * 64)
        self.index.upgrade(self.elastic, drop_missing=True)
        self.held = {name: (self.held[name][0], self.files[name]) for name in self.held if name in self.files}
        self.retriever = Retriever.open(self.index.path, encoder=self.elastic)
        self.seen = dict(self.held)

    @rule()
    def repair(self):
        report = Index.repair(self.index.path, encoder=self.elastic)
        assert (report.damage, report.lost, report.whole) == ((), (), True)

    @rule()
    def reopen(self):
        self.index = Index.open(self.index.path)
        self.index._encoder = self.elastic

    @rule()
    def reload(self):
        self.retriever.reload()
        self.seen = dict(self.held)

    @rule(seed=SEEDS, k=st.integers(1, 10))
    def search(self, seed, k):
        encoder = self.elastic.encoder("XL")
        query = encoder.embed([PICTURES[seed]])[0].astype(np.float64)
        scores = {other: float(encoder.embed([PICTURES[other]])[0] @ query) for other in PICTURES}
        wanted = sorted((-round(scores[content], 5), number) for number, content in self.seen.values())[:k]
        hits = self.retriever.search(PICTURES[seed], encoder="XL", k=k)
        assert [(-round(hit.score, 5), hit.id) for hit in hits] == wanted

    @invariant()
    def is_whole(self):
        assert Index.open(self.index.path).verify() == []
        assert Index.open(self.index.path).info().items == len(self.held)


IndexMachine.TestCase.settings = settings(
    max_examples=RUNS,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="MATVIT_SOAK_SHARD" not in os.environ,  # CI repeats itself; each shard of a soak has its own seed
)
TestIndex = pytest.mark.timeout(0)(IndexMachine.TestCase)
