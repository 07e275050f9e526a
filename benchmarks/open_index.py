"""What opening an index costs: its size and its items (Index), its vectors too (Retriever), every byte (verify).

    python benchmarks/open_index.py [--rows 1000000] [--rounds 3] [--json]

The index is synthetic, in segments as compaction leaves them, and in the page cache: a cold disk adds its reading time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from retrieval import Index, Retriever
from retrieval.files import sha256_file
from retrieval.items import Item
from retrieval.lock import writer_lock
from retrieval.manifest import EncoderEntry, Manifest, make_folders, publish_manifest
from retrieval.writer import Entry, GenerationWriter

DIM, SEGMENT_ROWS = 384, 16_384


NO_ENCODER = EncoderEntry(
    name="none", source=None, space_id="0" * 64, weights_sha256=None, spec="XL", resolution=112, embedding_dim=DIM
)


def make_index(folder: Path, rows: int, *, encoder: EncoderEntry = NO_ENCODER) -> None:
    """An index of `rows` random unit vectors of width DIM, and items as photographs have them."""
    make_folders(folder)
    manifest = Manifest(
        generation=1,
        parent=None,
        created=datetime.now(UTC),
        encoder=encoder,
        roots={"photos": "/photos"},
        segments=(),
        deletions={},
        next_id=0,
    )
    publish_manifest(folder, manifest)
    random = np.random.default_rng(0)
    with writer_lock(folder):
        writer = GenerationWriter(folder, manifest)
        for start in range(0, rows, SEGMENT_ROWS):
            vectors = random.standard_normal((min(SEGMENT_ROWS, rows - start), DIM), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            entries = [
                Entry(item=_item(start + row), embedding=vector, replaces=None) for row, vector in enumerate(vectors)
            ]
            writer.publish(entries, deleted={}, roots=manifest.roots, next_id=start + len(entries))


def _item(number: int) -> Item:
    return Item(
        id=number,
        root="photos",
        path=f"2024/{number // 1000:04d}/IMG_{number:07d}.jpg".encode(),
        content_sha256=f"{number:064x}",
        size=3_000_000,
        mtime_ns=1_700_000_000_000_000_000 + number,
        width=4032,
        height=3024,
        status="ok",
        reason=None,
        row=None,
    )


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median over the rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way to open, and of hashing the embeddings alone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        make_index(folder, rows)
        embeddings = sorted(folder.glob("segments/*/embeddings.f32"))
        return {
            "rows": rows,
            "Index.open": seconds(lambda: Index.open(folder), rounds),
            "hashing the embeddings": seconds(lambda: [sha256_file(path) for path in embeddings], rounds),
            "Retriever.open": seconds(lambda: Retriever.open(folder), rounds),
            "Index.verify": seconds(lambda: Index.open(folder).verify(), 1),
        }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.rows, arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result.pop('rows'):,} rows of width {DIM}")
    for name, value in result.items():
        print(f"  {name:24s} {value:8.3f} s")


if __name__ == "__main__":
    main()
