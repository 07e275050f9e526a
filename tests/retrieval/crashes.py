"""Runs one operation on an index in a forked process, and kills it on request. Not a test: a helper process.

Reads one JSON object a line: op, folder, photos, and `step` (SIGKILL at that change of the file system, from 0) or `ms`
(SIGKILL after so long); answers {"killed", "code"}. It forks from a process without threads, so no lock is torn.
"""

from __future__ import annotations

import json
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


def die_at(step: int) -> None:
    """Every change counts; the one that is `step` happens or not, by turns."""
    count = iter(range(10**9))
    os.fsync = lambda descriptor: None  # a kill leaves the system running: syncing would only take time

    def wrap(real):
        def call(*arguments, **named):
            if next(count) == step:
                if step % 2:
                    real(*arguments, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def child(job: dict) -> None:
    code = 1
    try:
        if job.get("step") is not None:
            die_at(job["step"])
        operate(job["op"], Path(job["folder"]), Path(job["photos"]))
        code = 0
    except BaseException as error:
        print(f"{job}: {error!r}", file=sys.stderr, flush=True)
    os._exit(code)


def main() -> None:
    choice.LEAST_ROWS = 1
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            child(job)
        if job.get("ms") is not None:
            time.sleep(job["ms"] / 1000)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": killed, "code": None if killed else os.WEXITSTATUS(status)}), flush=True)


if __name__ == "__main__":
    main()
