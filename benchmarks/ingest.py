"""Indexing beside the bounds that its parts set, in one run; and the memory that it takes as the collection grows.

    python benchmarks/ingest.py [--encoders XL,S-d8-r56] [--pictures 256] [--rounds 5] [--device cuda]
        [--sources 160px,12MP] [--cores 0,1] [--asleep MS] [--json]
    python benchmarks/ingest.py --sizes 10000,100000,1000000 [--json]

Each round measures, in a random order: decoding alone on one thread, decoding alone on all cores as ingest does it,
encoding alone in the batches and threads that ingest uses (that is the bare forward), and ingest. Core-seconds are this
process's own, and for ingest its decoders', too; what the main process takes of those bounds any ingest, however many
cores there are. With --asleep, the encoder only waits so many milliseconds a picture, as one does whose device
computes. Bounds: "shared cores" is cores / (core-seconds of decoding, on one thread, and of encoding), which holds
where both run on the same cores; "two devices" is 1 / max(seconds of decoding on all cores, of encoding), which holds
for another device. Rates are medians; shares are medians over the rounds of a round's own share. "Parts of ingest" is
the core-seconds of decoding and encoding beside those of ingest, the share of the first bound that other programs do
not disturb. "Others' cores" is what else the machine computed meanwhile.
With --sizes: the memory of a process that indexes so many tiny pictures in tar shards with a cheap encoder, of one
that then finds all of them unchanged, of one that adds one picture to them, and of those that verify the index, upgrade
it and repair it with a flipped bit in each segment, looked at 200 times a second. "Own" (RssAnon) is what
a process holds itself; "files" (RssFile) are pages of libraries and of mapped embeddings, which the system drops when
it needs the room. Opening the index comes before each of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matvit.decoding import ANY_MEMORY
from matvit.encoder import ImageEncoder
from matvit.preprocess import FloatArray, ImageSource, Preprocessing
from matvit.spec import EncoderShape, SubmodelSpec
from matvit.threads import limited, threads_of_each, usable_cores
from matvit_data import demo_folder
from retrieval import Index
from retrieval.loading import SMALL_BYTES
from retrieval.pipeline import Way, way_of

LARGE = (4032, 3024)  # pixels, 12 million
UNIQUE = 32  # large pictures that are made
SHARD = 10_000  # pictures in a tar
WARM_UP = 4096  # pictures at most that go through all of it before the first round
ON_ONE_THREAD = 1024  # pictures at most that are decoded on one thread, which takes longest
RUNS = ("first", "again", "one more", "verify", "upgrade", "repair")


# --- rates ---------------------------------------------------------------------------------------


def small_pictures(folder: Path, count: int) -> list[Path]:
    """`count` WebPs: the demo photographs, of 160 px, again and again."""
    photos = [path.read_bytes() for path in sorted((demo_folder() / "images").rglob("*.webp"))]
    return [_file(folder / f"{number}.webp", photos[number % len(photos)]) for number in range(count)]


def large_pictures(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of 12 megapixels with noise as of a camera, `UNIQUE` of them again and again."""
    photos = sorted((demo_folder() / "images").rglob("*.webp"))
    random = np.random.default_rng(0)
    made = []
    for path in photos[: min(UNIQUE, count)]:
        pixels = np.asarray(Image.open(path).convert("RGB").resize(LARGE, Image.Resampling.BICUBIC))
        noise = random.integers(-12, 13, (*pixels.shape[:2], 1), dtype=np.int16)
        jpeg = io.BytesIO()
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
        made.append(jpeg.getvalue())
    return [_file(folder / f"{number}.jpg", made[number % len(made)]) for number in range(count)]


def _file(path: Path, picture: bytes) -> Path:
    """With its name behind the picture: a content that the index has already is not decoded again."""
    path.write_bytes(picture + path.name.encode())
    return path


SOURCES = {"160px": small_pictures, "12MP": large_pictures}
Measure = Callable[[Any, str, Sequence[Path], int], dict[str, Any]]  # the elastic encoder, a spec, files, rounds


@dataclass
class WithEncoders:
    """An elastic encoder that embeds with others than its own: one submodel whatever is asked for, or `Asleep` ones."""

    elastic: Any
    encoder: Callable[..., Any]  # by spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.elastic, name)


class Asleep:
    """A device that computes for `ms` milliseconds a picture, one batch after the other, in place of an encoder."""

    runtime = "asleep"

    def __init__(self, encoder: Any, ms: float) -> None:
        self._encoder, self._ms, self._busy = encoder, ms, threading.Lock()

    def for_batches(self) -> Asleep:
        """Itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, pixels: FloatArray) -> FloatArray:
        """(N, D) float32, all the same."""
        with self._busy:
            time.sleep(1e-3 * self._ms * len(pixels))
        return np.full((len(pixels), self.embedding_dim), self.embedding_dim**-0.5, np.float32)


@dataclass(frozen=True)
class Spent:
    """What one picture took."""

    seconds: float
    main_seconds: float  # core-seconds of this process
    core_seconds: float  # of this process and of those that it started, which ended meanwhile
    others: float  # cores that everything else on this machine kept busy meanwhile


def spent(work: Callable[[], object], count: int) -> Spent:
    """Of each of `count` pictures, when `work` does them all."""
    start, main, own, busy = time.perf_counter(), time.process_time(), _own(), _busy()
    work()
    seconds, main = time.perf_counter() - start, time.process_time() - main
    own, busy = _own() - own, _busy() - busy
    return Spent(seconds / count, main / count, (main + own) / count, max(0.0, busy - main - own) / seconds)


def _own() -> float:
    """Core-seconds of processes that this one started, and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _busy() -> float:
    """Core-seconds that this machine has computed since it started."""
    user, nice, system, _, _, interrupts, soft_interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def one_round(
    elastic: Any, encoder: ImageEncoder, files: Sequence[Path], batches: list[FloatArray], way: Way
) -> dict[str, Spent]:
    """Each part alone, and all of it."""
    index_of = WithEncoders(elastic, lambda _=None: encoder)
    cores = usable_cores()
    together = [files[start : start + way.together] for start in range(0, len(files), way.together)]
    all_started = threading.Barrier(cores)

    def decode(some: Sequence[Path]) -> None:
        if way.decoders is None:
            encoder.preprocess(some)
        else:
            names = [str(file) for file in some]
            found = way.decoders.read(names, largest=SMALL_BYTES, memory=ANY_MEMORY, wanted=lambda *_: True)
            for file, one in zip(some, found, strict=True):
                if one is None:
                    way.decoders.decode([(file.read_bytes(), str(file))], memory=ANY_MEMORY)

    def begin(_: int) -> None:
        decode(files[:1])
        all_started.wait()

    with (
        tempfile.TemporaryDirectory() as temporary,
        limited("torch", threads_of_each()),
        way.decoders or nullcontext(),
        ThreadPoolExecutor(cores) as decoders,
        ThreadPoolExecutor(way.at_once) as encoders,
    ):
        index = Index.create(Path(temporary) / "index", encoder=index_of)  # type: ignore[arg-type]
        list(decoders.map(begin, range(cores)))
        some = files[:ON_ONE_THREAD]
        works: dict[str, tuple[Callable[[], object], int]] = {
            "decode": (lambda: [encoder.preprocess([file]) for file in some], len(some)),
            "decode on all cores": (lambda: list(decoders.map(decode, together)), len(files)),
            "encode": (lambda: list(encoders.map(way.encode, batches)), len(files)),
            "ingest": (lambda: index.ingest(files[0].parent), len(files)),
        }
        names = random.sample(sorted(works), len(works))
        return {name: spent(*works[name]) for name in names}


def measure(elastic: Any, spec: str, files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """One encoder on one kind of picture, as ingest does it."""
    encoder = elastic.encoder(spec)
    way = way_of(encoder)
    batch = way.batch
    pixels = np.concatenate([encoder.preprocess([file]) for file in files[: 8 * batch]])
    if way.decoders is not None:
        pixels = pixels.astype(np.uint8)  # of any values
    starts = range(0, len(files), batch)  # the same few batches again and again: all would take gigabytes
    batches = [pixels[start % len(pixels) :][: min(batch, len(files) - start)] for start in starts]
    with tempfile.TemporaryDirectory(dir=files[0].parents[1]) as few:
        some = [Path(few) / file.name for file in files[:WARM_UP]]
        for link, file in zip(some, files, strict=False):
            link.hardlink_to(file)
        one_round(elastic, encoder, some, batches[: -(-len(some) // batch)], way_of(encoder))
    every = [one_round(elastic, encoder, files, batches, way_of(encoder)) for _ in range(rounds)]

    def median(value: Callable[[dict[str, Spent]], float]) -> float:
        return statistics.median(map(value, every))

    def parts(one: dict[str, Spent]) -> float:
        return one["decode"].core_seconds + one["encode"].core_seconds

    def shared_cores(one: dict[str, Spent]) -> float:
        return usable_cores() / parts(one)

    def two_devices(one: dict[str, Spent]) -> float:
        return 1 / max(one["decode on all cores"].seconds, one["encode"].seconds)

    def forward(one: dict[str, Spent]) -> float:
        return 1 / one["encode"].seconds

    bounds = {"shared cores": shared_cores, "two devices": two_devices, "forward": forward}
    return {
        "count": len(files),
        "decoders": "threads" if way.decoders is None else "processes",
        "runtime": encoder.runtime,
        "cores": usable_cores(),
        "batch": way.batch,
        "at_once": way.at_once,
        "threads_of_each": threads_of_each(),
        "core_ms": {name: 1e3 * median(lambda one, name=name: one[name].core_seconds) for name in sorted(every[0])},
        "main_ms": 1e3 * median(lambda one: one["ingest"].main_seconds),
        "rate": median(lambda one: 1 / one["ingest"].seconds),
        "bounds": {name: median(bound) for name, bound in bounds.items()},
        "shares": {
            name: median(lambda one, bound=bound: 1 / one["ingest"].seconds / bound(one))
            for name, bound in bounds.items()
        },
        "parts_of_ingest": median(lambda one: parts(one) / one["ingest"].core_seconds),
        "others": median(lambda one: one["ingest"].others),
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """What this benchmark and decoders.py are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", default="XL,S-d8-r56")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--asleep", type=float, metavar="MS", help="in place of an encoder, wait so long a picture")
    parser.add_argument("--cores", help="use no others, such as 0,1")
    parser.add_argument("--json", action="store_true")
    return parser


def measure_all(arguments: argparse.Namespace, one: Measure) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What `one` measures of every encoder on every kind of picture: their names, and that."""
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    from matvit import MatViT  # imports torch, which counts the cores

    elastic: Any = MatViT.from_pretrained("matvit-small").to(arguments.device)
    if arguments.asleep is not None:
        awake = elastic
        elastic = WithEncoders(awake, lambda spec=None: Asleep(awake.encoder(spec), arguments.asleep))
    for source in arguments.sources.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / source
            folder.mkdir()
            files = SOURCES[source](folder, arguments.pictures)
            for spec in arguments.encoders.split(","):
                yield source, spec, one(elastic, spec, files, arguments.rounds)


def print_rates(rows: Sequence[dict[str, Any]]) -> None:
    """As a table."""
    print("| pictures | encoder | core-ms: decode | on all cores | encode ", end="")
    print("| ingest | of these the main process's | parts of ingest ", end="")
    print("| ingest/s | shared cores: bound/s | share | two devices: bound/s | share ", end="")
    print("| forward/s | share | others' cores |")
    print("|---" * 16 + "|")
    for row in rows:
        core = row["core_ms"]
        columns = [f"{row['count']} of {row['pictures']}", row["encoder"]]
        columns += [f"{core[name]:.2f}" for name in ("decode", "decode on all cores", "encode", "ingest")]
        columns += [f"{row['main_ms']:.2f}", f"{row['parts_of_ingest']:.3f}", f"{row['rate']:.1f}"]
        for name, bound in row["bounds"].items():
            columns += [f"{bound:.1f}", f"{row['shares'][name]:.3f}"]
        print("| " + " | ".join([*columns, f"{row['others']:.2f}"]) + " |")
    first = rows[0]
    print(f"\n{first['runtime']}, {first['cores']} cores, {first['threads_of_each']} torch thread(s) each; ", end="")
    print(f"decoded in {first['decoders']}, {first['at_once']} batches of {first['batch']} at once")


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
    opened: list[Index] = []
    opening = spent(lambda: opened.append(Index.open(path)), 1)
    [index] = opened
    before = resident()

    def work() -> object:
        if run == "verify":
            return index.verify() == []
        if run == "upgrade":
            return index.upgrade(other).published
        if run == "repair":
            return Index.repair(path, encoder=other).whole
        files = one if run == "one more" else str(folder / "*.tar")
        return bool(index.ingest(files, encoder=elastic).indexed) == (run != "again")

    done: list[object] = []
    with watched() as most:
        took = spent(lambda: done.append(work()), 1)
    assert done == [True], f"{run}: not what was to be measured"
    print(json.dumps({"before": before, "most": most, "opening": asdict(opening), "work": asdict(took)}))


def resident() -> dict[str, float]:
    """MiB of this process in memory, by kind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"own": "RssAnon", "files": "RssFile", "all": "VmRSS"}
    return {name: int(lines[key].split()[0]) / 1024 for name, key in names.items()}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most that this process held of each kind of memory within the block."""
    most, ended = resident(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most.update({name: max(held, most[name]) for name, held in resident().items()})

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


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
    print("| pictures | run | MiB before: own | files | at most: own | files | both ", end="")
    print("| core-seconds: to open | to do |")
    print("|---" * 9 + "|")
    for row in rows:
        for name in RUNS:
            run, before, most = row[name], row[name]["before"], row[name]["most"]
            print(
                f"| {row['size']:,} | {name} | {before['own']:.0f} | {before['files']:.0f} "
                f"| {most['own']:.0f} | {most['files']:.0f} | {most['all']:.0f} "
                f"| {run['opening']['core_seconds']:.2f} | {run['work']['core_seconds']:.2f} |"
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
        rows = [{"pictures": source, "encoder": spec, **row} for source, spec, row in found]
        show = print_rates
    print(json.dumps(rows, indent=2)) if arguments.json else show(rows)


if __name__ == "__main__":
    main()
