"""Indexing beside its parts, in one run; and the memory that it takes as the collection grows.

    python benchmarks/ingest.py [--encoders XL,S-d8-r56] [--pictures 256] [--rounds 5] [--device cuda]
        [--sources 160px,12MP] [--json]
    python benchmarks/ingest.py --sizes 10000,100000,1000000 [--json]

"Parts alone" is 1 / (decode + encode seconds) on a CPU, and 1 / max(decode, encode) on another device, each on all
cores; it leaves out reading, hashing and publishing. It is no bound: ingest does them at the same time, and may be
quicker. Each round measures decoding alone, the forward pass alone, and all of it: rates are medians, ratios medians
over the rounds of a round's own ratio. Core-seconds are the process's own, so that their ratio ("parts of ingest":
decode and forward beside all of it) holds on a busy machine, too.
With --sizes: the memory of a process that indexes so many tiny pictures in tar shards with a cheap encoder, of one
that then finds all of them unchanged, of one that adds one picture to them, and of those that verify the index, upgrade
it and repair it with a flipped bit in each segment; "held" is its own memory, without the pages of libraries, sampled.
Seconds are those of the call; opening the index is benchmarks/open_index.py's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray, ImageSource, Preprocessing
from matvit.progress import ProgressEvent
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.threads import batches_at_once, limited, threads_of_each, usable_cores
from matvit_data import demo_folder
from retrieval import Index
from retrieval.pipeline import BATCH

LARGE = (4032, 3024)  # pixels, 12 million
UNIQUE = 32  # large pictures that are made; the others are the same under other names
SHARD = 10_000  # pictures in a tar
RUNS = ("first", "again", "one more", "verify", "upgrade", "repair")


# --- rates ---------------------------------------------------------------------------------------


def small_pictures(folder: Path, count: int) -> list[Path]:
    """The demo photographs, of 160 px, under `count` names."""
    photos = sorted((demo_folder() / "images").rglob("*.webp"))
    for number in range(count):
        (folder / f"{number}.webp").write_bytes(photos[number % len(photos)].read_bytes())
    return sorted(folder.iterdir())


def large_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of 12 megapixels with noise as of a camera, under `count` names."""
    photos = sorted((demo_folder() / "images").rglob("*.webp"))
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number}.jpg"
        if number >= UNIQUE:
            os.link(folder / f"{number % UNIQUE}.jpg", path)
            continue
        pixels = np.asarray(Image.open(photos[number]).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC))
        noise = random.integers(-12, 13, (*pixels.shape[:2], 1), dtype=np.int16)
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
    return sorted(folder.iterdir())


SOURCES = {"160px": small_pictures, "12MP": large_pictures}
Measure = Callable[[Any, str, Sequence[Path], int], dict[str, Any]]  # the elastic encoder, a spec, files, rounds


@dataclass
class Only:
    """An elastic encoder that indexes with one of its submodels, to see the cost of any."""

    elastic: Any
    chosen: ImageEncoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.elastic, name)

    def encoder(self, spec: object = None) -> ImageEncoder:  # noqa: ARG002
        """The one."""
        return self.chosen


@dataclass(frozen=True)
class Spent:
    """What one picture took."""

    seconds: float
    core_seconds: float  # of this process


def spent(work: Callable[[], object], count: int) -> Spent:
    """Of each of `count` pictures, when `work` does them all."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent((time.perf_counter() - start) / count, (time.process_time() - cpu) / count)


def one_round(
    elastic: Any, encoder: ImageEncoder, files: Sequence[Path], batches: list[FloatArray]
) -> dict[str, Spent]:
    """Each part alone on all cores, and all of it."""
    count, parallel = len(files), batches_at_once()
    index_of = Only(elastic, encoder)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(usable_cores()) as pool:
        index = Index.create(Path(temporary) / "index", encoder=index_of)  # type: ignore[arg-type]
        found = {
            "ingest": spent(lambda: index.ingest(files), count),
            "decode": spent(lambda: list(pool.map(lambda file: encoder.preprocess([file]), files)), count),
            "forward": spent(lambda: [encoder.encode(batch) for batch in batches], count),
        }
    with limited("torch", threads_of_each()), ThreadPoolExecutor(parallel) as pool:
        found["at once"] = spent(lambda: list(pool.map(encoder.encode, batches)), count)
    return found


def measure(elastic: Any, spec: str, files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """One encoder on one kind of picture."""
    encoder = elastic.encoder(spec)
    pixels = np.concatenate([encoder.preprocess([file]) for file in files])
    batches = [pixels[start : start + BATCH] for start in range(0, len(files), BATCH)]
    every = [one_round(elastic, encoder, files, batches) for _ in range(1 + rounds)][1:]  # the first warms up
    shared = encoder.runtime.endswith("cpu")

    def median(value: Callable[[dict[str, Spent]], float]) -> float:
        return statistics.median(map(value, every))

    def alone(one: dict[str, Spent]) -> float:
        forward = min(one["forward"].seconds, one["at once"].seconds)
        decode = one["decode"].seconds
        return 1 / (decode + forward) if shared else 1 / max(decode, forward)

    def cores(one: dict[str, Spent]) -> float:
        return one["decode"].core_seconds + min(one["forward"].core_seconds, one["at once"].core_seconds)

    return {
        "core_ms": {name: 1e3 * median(lambda one, name=name: one[name].core_seconds) for name in every[0]},
        "rates": {name: median(lambda one, name=name: 1 / one[name].seconds) for name in every[0]},
        "alone": median(alone),
        "of_alone": median(lambda one: 1 / one["ingest"].seconds / alone(one)),
        "of_forward": median(lambda one: one["forward"].seconds / one["ingest"].seconds),
        "of_core_seconds": median(lambda one: cores(one) / one["ingest"].core_seconds),
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """What this benchmark and decoders.py are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", default="XL,S-d8-r56")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    return parser


def measure_all(arguments: argparse.Namespace, one: Measure) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What `one` measures of every encoder on every kind of picture: their names, and that."""
    from matvit import MatViT

    elastic = MatViT.from_pretrained("matvit-small").to(arguments.device)
    for source in arguments.sources.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            files = SOURCES[source](Path(temporary), arguments.pictures)
            for spec in arguments.encoders.split(","):
                yield source, spec, one(elastic, spec, files, arguments.rounds)


def print_rates(rows: Sequence[dict[str, Any]]) -> None:
    """As a table."""
    print("| pictures | encoder | core-ms: decode | forward | ingest | parts of ingest ", end="")
    print("| pictures/s: parts alone | ingest | of parts alone | of the forward |")
    print("|---" * 10 + "|")
    for row in rows:
        core, speed = row["core_ms"], row["rates"]
        print(
            f"| {row['pictures']} | {row['encoder']} | {core['decode']:.2f} | "
            f"{min(core['forward'], core['at once']):.2f} | {core['ingest']:.2f} | {row['of_core_seconds']:.2f} | "
            f"{row['alone']:.1f} | {speed['ingest']:.1f} | {row['of_alone']:.2f} | {row['of_forward']:.2f} |"
        )


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cheap:
    """A fixed random projection of 4 x 4 pixels, as wide as the bundled encoder."""

    spec: SubmodelSpec
    space_id: str = "0" * 64
    runtime: str = "numpy-cpu"
    embedding_dim: int = 384

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        """(N, 3, 4, 4) float32."""
        return Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).batch(images, size=self.spec.image_size)

    def encode(self, pixels: FloatArray) -> FloatArray:
        """(N, D) float32."""
        projection = np.random.default_rng(0).standard_normal((pixels[0].size, self.embedding_dim), dtype=np.float32)
        embeddings = (pixels.reshape(len(pixels), -1) + 1e-3) @ projection
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)  # type: ignore[no-any-return]


_SHAPE = EncoderShape(ffn_widths=(64,), num_heads=1, image_size=4)


@dataclass
class CheapElastic:
    """Of which only the full encoder exists."""

    name: str = "cheap"
    source: str | None = None
    revision: str | None = None
    space_id: str = "0" * 64
    weights_sha256: str | None = None
    embedding_dim: int = 384
    shape: EncoderShape = _SHAPE

    def encoder(self, spec: str | SubmodelSpec | None = None) -> Cheap:
        """The one."""
        return Cheap(self.shape.spec(spec), space_id=self.space_id)


def write_shards(folder: Path, count: int) -> None:
    """`count` different BMP pictures of 4 x 4 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "grey").save(buffer, "BMP")
    template = buffer.getvalue()
    for start in range(0, count, SHARD):
        with tarfile.open(folder / f"{start // SHARD:06d}.tar", "w") as tar:
            for number in range(start, min(start + SHARD, count)):
                entry = tarfile.TarInfo(f"{number:08d}.bmp")
                entry.size = len(template)
                tar.addfile(entry, io.BytesIO(template[:-8] + number.to_bytes(8, "little")))


def one_run(folder: Path, run: str) -> None:
    """One of RUNS over the shards in `folder`; prints what it took."""
    path, one, elastic = folder / "index", folder / "one.png", CheapElastic()
    other = CheapElastic(space_id="1" * 64)
    if run == "first":
        Index.create(path, encoder=elastic)
    elif run == "one more":
        Image.new("RGB", (4, 4), "red").save(one)
    elif run == "repair":
        for embeddings in path.glob("segments/*/embeddings.f32"):
            with embeddings.open("r+b") as file:
                flipped = file.read(1)[0] ^ 1
                file.seek(0)
                file.write(bytes([flipped]))
    index, before, held = Index.open(path), _anonymous(), [0.0]

    def sample(event: ProgressEvent) -> None:  # noqa: ARG001
        held[0] = max(held[0], _anonymous())

    def work() -> object:
        if run == "verify":
            return index.verify(progress=sample) == []
        if run == "upgrade":
            return index.upgrade(other, progress=sample).published
        if run == "repair":
            return Index.repair(path, encoder=other, progress=sample).whole
        files = one if run == "one more" else str(folder / "*.tar")
        return bool(index.ingest(files, encoder=elastic, progress=sample).indexed) == (run != "again")

    done: list[object] = []
    took = spent(lambda: done.append(work()), 1)
    assert done == [True], f"{run}: not what was to be measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"before": before, "held": held[0], "peak": peak, **asdict(took)}))


def _anonymous() -> float:
    """MiB that the process itself holds: the system may drop the pages of libraries, and so hide what grows."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def memory(size: int) -> dict[str, Any]:
    """Of each run over `size` pictures, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder, size)
        found: dict[str, Any] = {"size": size}
        for run in RUNS:
            command = [sys.executable, __file__, "--child", temporary, "--run", run]
            found[run] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def print_memory(rows: Sequence[dict[str, Any]]) -> None:
    """As a table."""
    print("| pictures | run | MiB held before | at most | MiB resident, at most | seconds | core-seconds |")
    print("|---" * 7 + "|")
    for row in rows:
        for name in RUNS:
            run = row[name]
            print(
                f"| {row['size']:,} | {name} | {run['before']:.0f} | {run['held']:.0f} | {run['peak']:.0f} | "
                f"{run['seconds']:.1f} | {run['core_seconds']:.1f} |"
            )


def main() -> None:
    """Parse arguments, measure, print."""
    parser = options(__doc__)
    parser.add_argument("--sizes", help="measure memory instead, at so many pictures")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        one_run(arguments.child, arguments.run)
        return
    if arguments.sizes:
        rows, show = [memory(int(size)) for size in arguments.sizes.split(",")], print_memory
    else:
        found = measure_all(arguments, measure)
        rows, show = [{"pictures": source, "encoder": spec, **row} for source, spec, row in found], print_rates
    print(json.dumps(rows, indent=2)) if arguments.json else show(rows)


if __name__ == "__main__":
    main()
