"""The long forms of the index's hardest tests; writes what was run, and how it ended, to docs/soak.md.

make soak        # 5,000 runs of 50 steps, 3,000 kills, 1,000 flips in each kind of file: hours
MATVIT_SOAK_KILLS=300 MATVIT_SOAK_RUNS=200 python benchmarks/soak.py [--out docs/soak.md]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
FULL = {
    "MATVIT_SOAK_RUNS": 5000,
    "MATVIT_SOAK_STEPS": 50,
    "MATVIT_SOAK_KILLS": 3000,
    "MATVIT_SOAK_FLIPS": 1000,
    "MATVIT_SOAK_POWER": 20,
}
PARTS = (  # what, its test, the counts that it reads
    (
        "random changes against a model",
        "tests/retrieval/test_stateful.py",
        "{MATVIT_SOAK_RUNS} runs of up to {MATVIT_SOAK_STEPS} steps",
    ),
    (
        "kills",
        "tests/retrieval/test_crashes.py::test_a_kill_at_any_moment_leaves_a_whole_index_that_can_go_on",
        "{MATVIT_SOAK_KILLS} runs with SIGKILL at a random step or time",
    ),
    (
        "flipped bits",
        "tests/retrieval/test_damage.py::test_a_single_flipped_bit_in_any_file_is_found_before_it_can_be_searched",
        "{MATVIT_SOAK_FLIPS} in each file of an index",
    ),
    (
        "loss of power",
        "tests/retrieval/test_crashes.py::test_losing_power_at_any_sync_leaves_the_state_before_or_after",
        "{MATVIT_SOAK_POWER} disks at each sync of 4 operations",
    ),
    (
        "refused writes",
        "tests/retrieval/test_crashes.py::test_a_refused_write_is_one_clear_error_and_loses_nothing",
        "ENOSPC, EIO, EMFILE at every write of 4 operations",
    ),
)


def run_part(test: str, environment: dict[str, str]) -> tuple[str, float]:
    """pytest's last line and the seconds that it took."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-o", "timeout=0", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    passed = "passed" if done.returncode == 0 else re.sub(r" in [0-9.]+s.*", "", lines[-1]).strip("= ")
    return passed, time.monotonic() - start


def main() -> int:
    """Run every part and write the page; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak.md")
    out = parser.parse_args().out
    counts = {name: int(os.environ.get(name, full)) for name, full in FULL.items()}
    environment = os.environ | {name: str(count) for name, count in counts.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    setting = " ".join(f"{name}={count}" for name, count in counts.items() if count != FULL[name])
    head = [
        "# Soak of the index",
        "",
        "Written by `make soak`" + (f" with `{setting}`" if setting else "") + f", begun {datetime.now(UTC):%Y-%m-%d}, "
        f"commit {commit.stdout.strip() or 'unknown'}, Python {platform.python_version()}, {os.cpu_count()} cores.",
        "The full counts are "
        + ", ".join(f"{name.removeprefix('MATVIT_SOAK_').lower()} {full:,}" for name, full in FULL.items())
        + ".",
        "",
        "| what | how much | seconds | result |",
        "|---|---|---|---|",
    ]
    failed = False
    for what, test, much in PARTS:
        result, seconds = run_part(test, environment)
        failed |= result != "passed"
        head.append(f"| {what} | {much.format(**counts)} | {seconds:.0f} | {result} |")
        print(head[-1], flush=True)
        out.write_text("\n".join(head) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
