"""Searches an index in three threads until a file is there. Not a test: a helper process, one of many.

    python readers.py INDEX STOP

Prints one JSON object: for each generation that was seen, every different set of ids that it answered with.
A wrong vector, a hit that is not the nearest, a warning or an error ends it with a traceback.
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import warnings
from collections import defaultdict
from pathlib import Path

from retrieval import Retriever

HELPERS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
ANCHOR = 0  # this item is never deleted
seen: dict[int, set[tuple[int, ...]]] = defaultdict(set)


def look(retriever: Retriever) -> None:
    """Search one generation in every way, and remember what it held."""
    every = retriever.search(ANCHOR, k=None)
    assert every[0].id == ANCHOR
    seen[every.generation].add(tuple(sorted(hit.id for hit in every)))
    by_picture = retriever.search(HELPERS["picture_bytes"](ANCHOR), encoder="S", k=None)
    seen[by_picture.generation].add(tuple(sorted(hit.id for hit in by_picture)))
    some = retriever.search(ANCHOR, k=5)
    assert some[0].id == ANCHOR
    for hit in (*every, *some):
        assert hit.path.name == f"{hit.id}.png"
        expected = HELPERS["vector_of"](ANCHOR) @ HELPERS["vector_of"](hit.id)
        assert abs(hit.score - expected) < 1e-6


def repeat(what, stop: Path) -> None:
    while not stop.exists():
        what()


def main() -> None:
    warnings.simplefilter("error")
    folder, stop = Path(sys.argv[1]), Path(sys.argv[2])
    encoder = HELPERS["FakeElastic"]()
    shared = Retriever.open(folder, encoder=encoder)
    failures: list[threading.ExceptHookArgs] = []
    threading.excepthook = lambda failed: (failures.append(failed), threading.__excepthook__(failed))
    threads = [
        threading.Thread(target=repeat, args=(what, stop))
        for what in (lambda: look(shared), shared.reload, lambda: look(Retriever.open(folder, encoder=encoder)))
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    shared.reload()
    look(shared)
    print(json.dumps({generation: sorted(sets) for generation, sets in seen.items()}), flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
