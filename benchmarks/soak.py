"""The long forms of the index's hardest tests; writes what was run, and how it ended, to docs/soak.md.

make soak                                   # in full, on every core: hours of processor time
MATVIT_SOAK_KILLS=300 MATVIT_SOAK_RUNS=200 python benchmarks/soak.py --workers 4 [--out docs/soak.md]
python benchmarks/soak.py --only "kills,loss of power"      # the page keeps its other rows

The work is cut into shards, each a pytest of its own with its own seed (MATVIT_SOAK_SHARD). Needs no network and no
git: MATVIT_COMMIT names the commit where there is none.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = "tests/retrieval/"
FULL = {
    "MATVIT_SOAK_RUNS": 5000,
    "MATVIT_SOAK_STEPS": 50,
    "MATVIT_SOAK_KILLS": 3000,
    "MATVIT_SOAK_FLIPS": 1000,
    "MATVIT_SOAK_POWER": 20,
    "MATVIT_SOAK_IMAGES": 100_000,
    "MATVIT_SOAK_ROUNDS": 1000,
}


ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for each shard: they have all cores among them


@dataclass
class Part:
    """One test, and how its shards ended so far."""

    what: str
    test: str
    much: str
    count: str | None  # what is shared out among the shards; None: there is one shard
    shards: int = 0
    done: int = 0
    seconds: float = 0.0  # of processors, subprocesses included
    failures: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)  # the most that a shard told

    def add(self, seconds: float, text: str, failure: str | None) -> None:
        """What `run_shard` gave for one shard."""
        self.done += 1
        self.seconds += seconds
        for name, value in re.findall(r"^soak (.+): ([0-9.]+)$", text, re.MULTILINE):
            self.measured[name] = max(float(value), self.measured.get(name, 0.0))
        if failure is not None:
            print("\n".join(text.splitlines()[-40:]), file=sys.stderr, flush=True)
            self.failures.append(failure)


def parts() -> list[Part]:
    """Every part; those that cannot be cut, or take longest, first."""
    return [
        Part(
            "refused writes",
            "test_crashes.py::test_a_refused_write_is_one_clear_error_and_loses_nothing",
            "ENOSPC, EIO, EMFILE at every write of 6 operations",
            None,
        ),
        Part(
            "random changes against a model",
            "test_stateful.py",
            "{MATVIT_SOAK_RUNS:,} runs of up to {MATVIT_SOAK_STEPS} steps",
            "MATVIT_SOAK_RUNS",
        ),
        Part(
            "kills",
            "test_crashes.py::test_a_kill_at_any_moment_leaves_a_whole_index_that_can_go_on",
            "{MATVIT_SOAK_KILLS:,} runs ended by SIGKILL, at a step or a time of 6 operations",
            "MATVIT_SOAK_KILLS",
        ),
        Part(
            "mutated pictures",
            "test_mutations.py",
            "{MATVIT_SOAK_IMAGES:,} pictures",
            "MATVIT_SOAK_IMAGES",
        ),
        Part(
            "readers beside a writer",
            "test_readers.py",
            "{MATVIT_SOAK_ROUNDS:,} rounds of changes, read by 2 processes of 3 threads",
            "MATVIT_SOAK_ROUNDS",
        ),
        Part(
            "loss of power",
            "test_crashes.py -k losing_power",
            "{MATVIT_SOAK_POWER} disks at each sync of 5 operations",
            "MATVIT_SOAK_POWER",
        ),
        Part(
            "flipped bits",
            "test_damage.py -k single_flipped_bit",
            "{MATVIT_SOAK_FLIPS:,} in each file of an index, an approximate index, a staged upgrade, the lock",
            "MATVIT_SOAK_FLIPS",
        ),
    ]


def plan(part: Part, counts: dict[str, int], workers: int) -> Iterator[dict[str, int]]:
    """The environment of each shard of a part; together they do the whole count."""
    if part.count is None:
        yield {"MATVIT_SOAK_SHARD": 0}
        return
    shards = min(workers, counts[part.count])
    for shard in range(shards):
        share = counts[part.count] * (shard + 1) // shards - counts[part.count] * shard // shards
        yield counts | {part.count: share, "MATVIT_SOAK_SHARD": shard}


def run_shard(part: Part, environment: dict[str, int]) -> tuple[float, str, str | None]:
    """Run one pytest to its end: seconds of processors, what it printed, and how it failed, if it did."""
    shard = environment["MATVIT_SOAK_SHARD"]
    with tempfile.TemporaryDirectory(prefix="matvit-soak-") as home, tempfile.TemporaryFile("w+") as output:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for the tests' own processes
        own = {"TMPDIR": home, "PYTHONPATH": paths} | {name: str(value) for name, value in environment.items()}
        # A shard is one process: pytest-benchmark, where it is installed, refuses to be with --dist.
        options = ["-q", "-s", "--dist=no", "-o", "timeout=0", "-p", "no:cacheprovider", f"--hypothesis-seed={shard}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, f"--basetemp={home}/pytest", *f"{TESTS}{part.test}".split()],
            cwd=ROOT,
            env=ONE_THREAD | os.environ | own,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    failure = f"shard {shard} of {environment.get(part.count or '', 'all')}: {_last_line(text)}"
    return usage.ru_utime + usage.ru_stime, text, failure if process.returncode else None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    return re.sub(r" in [0-9.]+s.*", "", lines[-1]).strip("= ")


@dataclass(frozen=True)
class Before:
    """What earlier runs wrote, and one of some parts keeps."""

    heads: list[str] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)  # by the part's name

    @classmethod
    def read(cls, path: Path, option: str) -> Before:
        """`option`: this run's --only; it replaces what the same one wrote."""
        if not option or not path.exists():
            return cls()
        lines = path.read_text(encoding="utf-8").splitlines()
        return cls(
            heads=[line for line in lines if line.startswith("Written by ") and option not in line],
            rows={line.split("|")[1].strip(): line for line in lines if line.startswith("| ")},
        )


def page(run: list[Part], counts: dict[str, int], head: str, before: Before) -> str:
    """docs/soak.md as far as the parts have come."""
    full = ", ".join(f"{name.removeprefix('MATVIT_SOAK_').lower()} {count:,}" for name, count in FULL.items())
    lines = [
        "# Soak of the index",
        "",
        *before.heads,
        head,
        f"The full counts are {full}.",
        "",
        "| what | how much | processor seconds | result |",
        "|---|---|---|---|",
    ]
    rows = before.rows | {part.what: row(part, counts) for part in run}
    lines += [rows[part.what] for part in parts() if part.what in rows]
    return "\n".join(lines) + "\n"


def row(part: Part, counts: dict[str, int]) -> str:
    """A part's line in the table."""
    result = "passed" if part.done == part.shards else f"{part.done} of {part.shards} shards passed so far"
    if part.failures:
        result = f"{len(part.failures)} of {part.shards} shards failed: {'; '.join(part.failures)}"
    told = "".join(f"; {name} {value:g}" for name, value in part.measured.items())
    return f"| {part.what} | {part.much.format(**counts)} | {part.seconds:.0f} | {result}{told} |"


def heading(counts: dict[str, int], workers: int, option: str) -> Callable[[float], str]:
    """What the page says of the run, after so many seconds."""
    setting = "".join(f"{name}={count} " for name, count in counts.items() if count != FULL[name])
    where = f"Python {platform.python_version()}, {os.cpu_count()} cores of {processor()}"
    begun = f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}"
    command = f"{setting}python benchmarks/soak.py --workers {workers}{option}"
    return lambda seconds: f"Written by `{command}`, begun {begun}, {where}; {seconds:.0f} seconds."


def commit() -> str:
    """MATVIT_COMMIT, or what git says."""
    if named := os.environ.get("MATVIT_COMMIT"):
        return named
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def main() -> int:
    """Run the parts and write the page; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time (all cores)")
    parser.add_argument(
        "--only", metavar="PARTS", help="parts to run, as the page names them, with commas between them"
    )
    arguments = parser.parse_args()
    names = [name.strip() for name in (arguments.only or "").split(",") if name.strip()]
    if unknown := set(names) - {part.what for part in parts()}:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(part.what for part in parts())}")
    run = [part for part in parts() if not names or part.what in names]
    option = f' --only "{",".join(names)}"' if names else ""
    counts = {name: int(os.environ.get(name, full)) for name, full in FULL.items()}
    head, start = heading(counts, arguments.workers, option), time.monotonic()
    before = Before.read(arguments.out, option)
    with ThreadPoolExecutor(arguments.workers) as pool:
        waiting = {}
        for part in run:
            shards = list(plan(part, counts, arguments.workers))
            part.shards = len(shards)
            waiting |= {pool.submit(run_shard, part, shard): part for shard in shards}
        for done in as_completed(waiting):
            part = waiting[done]
            part.add(*done.result())
            seconds = time.monotonic() - start
            print(
                f"{seconds:.0f} s: {part.what}, {part.done} of {part.shards}, {len(part.failures)} failed", flush=True
            )
            arguments.out.write_text(page(run, counts, head(seconds), before), encoding="utf-8")
    return int(any(part.failures for part in run))


if __name__ == "__main__":
    raise SystemExit(main())
