"""Killed at any moment, without power at any moment, refused by the disk at any write: an index stays whole.

`make soak` runs more of each: MATVIT_SOAK_KILLS, MATVIT_SOAK_POWER.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import retrieval.items
from matvit.errors import MatVitError
from retrieval import Index, Retriever
from retrieval.backends import choice

KILLS = int(os.environ.get("MATVIT_SOAK_KILLS", "30"))
POWER = int(os.environ.get("MATVIT_SOAK_POWER", "1"))  # disks that a loss of power may leave, at each sync
SHARD = os.environ.get("MATVIT_SOAK_SHARD")  # of a soak, 0 or more: its seed
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EMFILE)
OPERATIONS = ("ingest", "delete", "compact", "search", "upgrade", "repair")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, and looks up open files through /proc")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing here takes power from a real disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def base(tmp_path, photos, elastic, picture, monkeypatch):
    """An approximate index of three segments, deletions and a skipped file, and photos that have changed since."""
    monkeypatch.setattr(choice, "LEAST_ROWS", 1)
    index = Index.build(photos, encoder=elastic, path=tmp_path / "base.index")
    (photos / "bad.png").write_text("no picture")
    (photos / "1.png").write_bytes(picture(31))
    index.ingest(photos, encoder=elastic)
    (photos / "more.png").write_bytes(picture(32))
    index.ingest(photos, encoder=elastic)
    assert index.set_search("sq").index_type == "sq"
    assert len(index._snapshot.segments) == 3  # not compacted: less than a tenth of the rows are dead
    (photos / "3.png").unlink()
    (photos / "4.png").write_bytes(picture(34))
    (photos / "new.png").write_bytes(picture(35))
    return index.path


def operate(op, folder, photos, elastic):
    if op == "repair":
        return Index.repair(folder, encoder=elastic)
    index = Index.open(folder)
    if op == "ingest":
        return index.ingest(photos, encoder=elastic, delete=True)
    if op == "delete":
        return index.delete([photos / "0.png"])
    if op == "search":
        return index.set_search("hnsw")
    if op == "compact":
        return index.compact()
    return index.upgrade(elastic.in_another_space(), drop_missing=True)


def state(folder, elastic):
    """What a fresh reader finds: path -> id and the vector's scores against two queries."""
    assert Index.open(folder).verify() == []
    space = Index.open(folder).info().space_id
    encoder = elastic if space == elastic.space_id else elastic.in_another_space()
    retriever = Retriever.open(folder, encoder=encoder)
    found: dict[Path, list[object]] = {}
    for hits in retriever.search_many([_query(1), _query(2)], k=99):
        for hit in hits:
            found.setdefault(hit.path, [hit.id]).append(round(hit.score, 6))
    return found


def _query(seed):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    pixels = bytes(random.Random(seed).randbytes(10 * 12 * 3))
    Image.frombytes("RGB", (12, 10), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def finish(op, folder, photos, elastic):
    """Run it again to its end; an upgrade or a deletion that was done already says so."""
    try:
        operate(op, folder, photos, elastic)
    except MatVitError as error:
        told = "in this encoder's embedding space already", "holds no picture"
        assert any(words in str(error) for words in told)  # noqa: PT017


def expected(base, photos, elastic):
    before, after = state(base, elastic), {}
    for op in OPERATIONS:
        folder = Path(shutil.copytree(base, base.with_name(f"after-{op}")))
        operate(op, folder, photos, elastic)
        after[op] = state(folder, elastic)
    return before, after


def check_between(now, before, after):
    """Everything that both states share is there; nothing that neither has."""
    for path, found in now.items():
        assert found in (before.get(path), after.get(path)), path
    for path in before.keys() & after.keys():
        assert path in now, path


def check_needs_no_repair(folder):
    """Whoever runs it all the same is told of nothing, and loses nothing."""
    report = Index.repair(folder)
    assert (report.whole, report.damage, report.lost, report.lost_unnamed) == (True, (), (), 0)


class Crashes:
    """Operations in processes of their own, to be killed: see crashes.py."""

    def __init__(self, base, photos):
        self.base, self.photos = base, photos
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crashes.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, op, **moment):
        """The folder that it leaves, and how far it came."""
        folder = Path(shutil.copytree(self.base, self.base.with_name("victim.index")))
        if op == "repair":
            (folder / "CURRENT").unlink()
        job = {"op": op, "folder": str(folder), "photos": str(self.photos), **moment}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        assert answer["killed"] or answer["code"] == 0, (op, moment)
        return folder, answer

    def whole(self, op):
        """An operation that nobody kills."""
        folder, answer = self.run(op)
        shutil.rmtree(folder)
        return answer


def test_a_kill_at_any_moment_leaves_a_whole_index_that_can_go_on(base, photos, elastic):
    before, after = expected(base, photos, elastic)
    chance = random.Random(f"kills {SHARD}")
    crashes = Crashes(base, photos)
    killed = Counter()
    with crashes.server as server:
        whole = {op: crashes.whole(op) for op in OPERATIONS}
        for number in range(4 * KILLS):
            op = OPERATIONS[number % len(OPERATIONS)]
            by = ("step", "time")[number // len(OPERATIONS) % 2]  # so each operation is killed both ways
            if by == "step":
                moment = {"step": chance.randrange(whole[op]["steps"]), "after": chance.random() < 0.5}
            else:  # after it has ended, now and then
                moment = {"seconds": chance.uniform(0, whole[op]["seconds"])}
            folder, answer = crashes.run(op, **moment)
            killed[op, by] += answer["killed"]
            if op == "repair" and not (folder / "CURRENT").exists():
                operate(op, folder, photos, elastic)
            check_between(state(folder, elastic), before, after[op])
            if chance.random() < 0.5:
                check_needs_no_repair(folder)
                check_between(state(folder, elastic), before, after[op])
            finish(op, folder, photos, elastic)
            assert state(folder, elastic) == after[op], (op, moment)
            assert not [path for path in folder.rglob(".tmp-*") if op not in {"delete"}], (op, moment)
            shutil.rmtree(folder)
            if killed.total() == KILLS:
                break
        server.stdin.close()
    assert killed.total() == KILLS
    assert all(killed[op, "step"] for op in OPERATIONS)


class PowerLoss:
    """Knows what the disk has: contents that were synced, names whose folder was; anything else may be there or not."""

    def __init__(self, folder, chance):
        self.folder, self.chance = folder, chance
        self.contents = {}  # inode -> bytes, as synced
        self.names = {}  # folder's inode -> {name: inode, is folder}, as synced
        for place in (folder, *folder.rglob("*")):
            self.sync(place)

    def sync(self, place):
        status = place.stat()
        if stat.S_ISDIR(status.st_mode):
            self.names[status.st_ino] = self.listing(place)
        else:
            self.contents[status.st_ino] = place.read_bytes()

    @staticmethod
    def listing(place):
        found = {}
        for path in place.iterdir():
            status = path.stat()
            found[path.name] = status.st_ino, stat.S_ISDIR(status.st_mode)
        return found

    def image(self, target):
        """One disk that losing power now may leave."""
        now = {}  # folder's inode -> names as the running system sees them
        data = {}
        for place in (self.folder, *self.folder.rglob("*")):
            status = place.stat()
            if stat.S_ISDIR(status.st_mode):
                now[status.st_ino] = self.listing(place)
            else:
                data[status.st_ino] = place.read_bytes()
        self.write(self.folder.stat().st_ino, target, now, data)

    def write(self, inode, target, now, data):
        target.mkdir()
        synced, current = self.names.get(inode, {}), now.get(inode, {})
        for name in sorted(synced.keys() | current.keys()):
            entries = [names.get(name) for names in (synced, current)]
            entry = entries[0] if entries[0] == entries[1] else self.chance.choice(entries)
            if entry is None:
                continue
            child, is_folder = entry
            if is_folder:
                self.write(child, target / name, now, data)
            else:
                (target / name).write_bytes(self.content(child, data))

    def content(self, inode, data):
        synced, current = self.contents.get(inode), data.get(inode)
        if current is None or synced == current:
            return synced if synced is not None else b""
        torn = current[: self.chance.randrange(len(current) + 1)] + bytes(self.chance.randrange(20))
        return self.chance.choice([synced or b"", current, torn, bytes(len(current))])


@pytest.mark.parametrize("op", ["ingest", "delete", "compact", "search", "upgrade"])
def test_losing_power_at_any_sync_leaves_the_state_before_or_after(base, photos, elastic, monkeypatch, op):
    before, after = expected(base, photos, elastic)
    folder = base.with_name("victim.index")
    shutil.copytree(base, folder)
    chance = random.Random(f"power {SHARD}")
    disk = PowerLoss(folder, chance)
    generations, images = [Index.open(folder).generation], []

    def fsync(descriptor):
        for _ in range(POWER):
            images.append((folder.with_name(f"image-{len(images)}"), max(generations)))
            disk.image(images[-1][0])
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        if folder in (place, *place.parents):
            disk.sync(place)
            if place == folder:  # CURRENT's name is on the disk
                generations.append(int((folder / "CURRENT").read_text().split(".")[0]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        operate(op, folder, photos, elastic)
    assert len(images) >= 4 * POWER
    for image, at_least in images:
        assert Index.open(image).generation >= at_least  # what was published stays published
        check_between(state(image, elastic), before, after[op])
        if chance.random() < 0.5:
            check_needs_no_repair(image)
            check_between(state(image, elastic), before, after[op])
        if chance.random() < 0.3:
            finish(op, image, photos, elastic)
            assert state(image, elastic) == after[op]
        shutil.rmtree(image)


def test_losing_power_while_an_index_is_made_leaves_none_or_one_that_can_grow(tmp_path, photos, elastic, monkeypatch):
    home = tmp_path / "disk"
    home.mkdir()
    disk, images = PowerLoss(home, random.Random(f"making {SHARD}")), []

    def lose_power():
        images.append(tmp_path / f"image-{len(images)}")
        disk.image(images[-1])

    def fsync(descriptor):
        for _ in range(POWER):
            lose_power()
        disk.sync(Path(f"/proc/self/fd/{descriptor}").readlink())

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        Index.build(photos, encoder=elastic, path=home / "new" / "index")
    after = state(home / "new" / "index", elastic)
    lose_power()
    assert state(images[-1] / "new" / "index", elastic) == after
    for image in images:
        folder = image / "new" / "index"
        if (folder / "CURRENT").exists():
            Index.open(folder).ingest(photos, encoder=elastic)
        else:
            Index.build(photos, encoder=elastic, path=folder)
        assert state(folder, elastic) == after
        shutil.rmtree(image)


class Refusals:
    """The `at`-th write of any kind fails with one errno."""

    def __init__(self, patch, number, at):
        self.calls, self.number, self.at = 0, number, at
        for name in ("fsync", "replace", "mkdir", "link", "ftruncate", "write"):
            patch.setattr(os, name, self.refusing(getattr(os, name)))
        patch.setattr(Path, "open", self.opening(Path.open))
        patch.setattr(retrieval.items.sqlite3, "connect", self.connecting(sqlite3.connect))

    def count(self):
        self.calls += 1
        if self.calls - 1 == self.at:
            raise OSError(self.number, os.strerror(self.number))

    def refusing(self, real):
        def call(*arguments, **named):
            self.count()
            return real(*arguments, **named)

        return call

    def opening(self, real):
        def call(path, mode="r", *arguments, **named):
            if mode in {"wb", "rb+"}:
                self.count()
            file = real(path, mode, *arguments, **named)
            if mode == "wb":
                write = file.write
                return _Written(file, self.refusing(write))
            return file

        return call

    def connecting(self, real):
        def call(name, *arguments, **named):
            if not named.get("uri"):
                try:
                    self.count()
                except OSError as error:
                    raise sqlite3.OperationalError(error.strerror) from error
            return real(name, *arguments, **named)

        return call


class _Written:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_refused_write_is_one_clear_error_and_loses_nothing(base, photos, elastic, monkeypatch, op, number):
    before, after = expected(base, photos, elastic)
    # Together the three reach every write; each of them does in a soak.
    first, stride = (0, 1) if SHARD else (ERRNOS.index(number), len(ERRNOS))
    for at in range(first, 300, stride):
        folder = base.with_name("victim.index")
        shutil.copytree(base, folder)
        if op == "repair":
            (folder / "CURRENT").unlink()
        with monkeypatch.context() as patch:
            refusals = Refusals(patch, number, at)
            try:
                operate(op, folder, photos, elastic)
            except MatVitError as error:
                assert os.strerror(number) in str(error)  # noqa: PT017 - the last attempt must succeed
                assert "\n" not in str(error)  # noqa: PT017
        if op == "repair" and not (folder / "CURRENT").exists():
            operate(op, folder, photos, elastic)
        check_between(state(folder, elastic), before, after[op])
        shutil.rmtree(folder)
        if refusals.calls <= at:
            break
    assert at >= 8
