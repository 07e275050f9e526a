"""Runs one operation on an index in a forked process, and kills it on request. Not a test: a helper process.

Reads one JSON object a line: op, folder, photos, and perhaps `step` (SIGKILL before that change of the file system,
from 0, or `after` it) or `seconds` (SIGKILL after so long); answers {"killed", "code", "steps", "seconds"}, as far as
it came.
It forks from a process without threads, so no lock is torn.
"""

from __future__ import annotations

import json
import mmap
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from retrieval import Index
from retrieval.backends import choice

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
STEPS = ("fsync", "replace", "mkdir", "link", "unlink", "rmdir")


def operate(op: str, folder: Path, photos: Path) -> None:
    elastic = HELPERS["FakeElastic"]()
    if op == "repair":
        Index.repair(folder, encoder=elastic)
    elif op == "ingest":
        Index.open(folder).ingest(photos, encoder=elastic, delete=True)
    elif op == "delete":
        Index.open(folder).delete([photos / "0.png"])
    elif op == "search":
        Index.open(folder).set_search("hnsw")
    elif op == "compact":
        Index.open(folder).compact()
    elif op == "upgrade":
        Index.open(folder).upgrade(elastic.in_another_space(), drop_missing=True)
    else:
        raise ValueError(op)


def die_at(step: int | None, *, after: bool, counted: mmap.mmap) -> None:
    """Every change of the file system counts; the process dies at one of them, unless `step` is None."""
    os.fsync = lambda descriptor: None  # a kill leaves the system running: syncing would only take time

    def wrap(real):
        def call(*arguments, **named):
            dying = _number(counted) == step
            counted[:] = (_number(counted) + 1).to_bytes(8)
            if dying and after:
                real(*arguments, **named)
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def _number(counted: mmap.mmap) -> int:
    return int.from_bytes(counted[:])


def child(job: dict, counted: mmap.mmap) -> None:
    code = 1
    try:
        die_at(job.get("step"), after=job.get("after", False), counted=counted)
        operate(job["op"], Path(job["folder"]), Path(job["photos"]))
        code = 0
    except BaseException as error:
        print(f"{job}: {error!r}", file=sys.stderr, flush=True)
    os._exit(code)


def main() -> None:
    choice.LEAST_ROWS = 1
    for line in sys.stdin:
        job = json.loads(line)
        counted, started = mmap.mmap(-1, 8), time.monotonic()  # shared with the child
        process = os.fork()
        if process == 0:
            child(job, counted)
        if job.get("seconds") is not None:
            time.sleep(job["seconds"])
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed = os.WIFSIGNALED(status)
        code = None if killed else os.WEXITSTATUS(status)
        seconds = time.monotonic() - started
        answer = {"killed": killed, "code": code, "steps": _number(counted), "seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
