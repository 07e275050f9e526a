"""One query while other programs compute: its threads wait for one another awake, shortly, asleep, or there is one.

    python benchmarks/waiting.py [--specs XL,XL-r98] [--rounds 10] [--busy 0]

Starts a process for each way, which encodes one picture when asked; they are asked in a random order, three times at
once, of which the first is left out. `--busy`: so many other processes compute without a pause.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict

WAYS = {
    "as OpenMP is set up": {},
    "shortly awake (as in the matvit command)": {"GOMP_SPINCOUNT": "10000"},
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
AT_ONCE = 3


def child(specs: list[str]) -> None:
    """Encode as each line of stdin says; answer with milliseconds of the clock and of the processor."""
    from matvit import MatViT
    from matvit_data import demo_folder

    picture = next((demo_folder() / "images").rglob("*.webp")).read_bytes()
    model = MatViT.from_pretrained("matvit-small")
    encoders = {spec: model.encoder(spec) for spec in specs}
    pixels = {spec: encoder.preprocess([picture]) for spec, encoder in encoders.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        spec = line.strip()
        clock, processor = time.perf_counter(), time.process_time()
        encoders[spec].encode(pixels[spec])
        print(1000 * (time.perf_counter() - clock), 1000 * (time.process_time() - processor), flush=True)


def start(variables: dict[str, str], specs: str) -> subprocess.Popen[str]:
    """A child with these variables, once it is ready."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | variables
    command = [sys.executable, __file__, "--child", "--specs", specs]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit(f"a child did not start: {' '.join(command)}")
    return process


def ask(process: subprocess.Popen[str], spec: str) -> tuple[float, float]:
    """Milliseconds of the clock and of the processor for one query."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(spec, file=process.stdin, flush=True)
    clock, processor = map(float, process.stdout.readline().split())
    return clock, processor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="XL,XL-r98")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    specs = arguments.specs.split(",")
    if arguments.child:
        child(specs)
        return
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    children = {way: start(variables, arguments.specs) for way, variables in WAYS.items()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    try:
        for _ in range(arguments.rounds):
            for spec, way in random.sample([(spec, way) for spec in specs for way in WAYS], len(specs) * len(WAYS)):
                found[spec, way] += [ask(children[way], spec) for _ in range(AT_ONCE)][1:]
    finally:
        for process in (*others, *children.values()):
            process.kill()
    load = f"{os.cpu_count()} cores, {arguments.busy} of them asked for by other processes"
    print(f"{load}; load {os.getloadavg()[0]:.1f}\n\n| encoder | threads wait | ms | of the first way | core-ms |")
    print("|---|---|---|---|---|")
    for spec in specs:
        first = statistics.median(clock for clock, _ in found[spec, next(iter(WAYS))])
        for way in WAYS:
            clock, processor = (statistics.median(column) for column in zip(*found[spec, way], strict=True))
            print(f"| {spec} | {way} | {clock:.0f} | {clock / first:.2f} | {processor:.0f} |")


if __name__ == "__main__":
    main()
