"""What `matvit adapt` gains on pictures that it never saw: recall@1 and agreement with XL, before and after.

    python benchmarks/adapting.py caltech-101/train --classes 50:101 [--pictures 300] [--queries 300] [--json]

DATASET is looked up below MATVIT_DATA. Two random parts of it are drawn: one that the encoder is adapted on, and
queries; both together are indexed by XL. Differences are paired, with 95 % bootstrap intervals over the queries.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matvit import MatViT
from matvit.adapting import adapt
from matvit.agreement import compare
from matvit.datasets import LabelledImages, data_folder, read_dataset
from matvit.metrics import bootstrap_intervals, top_k
from matvit.preprocess import FloatArray, ImageSource

_BATCH = 32
_Values = NDArray[np.float64]


def embed(model: MatViT, images: Sequence[ImageSource], spec: str) -> FloatArray:
    """(N, D) by the submodel `spec`."""
    encoder = model.encoder(spec)
    return np.concatenate([encoder.embed(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)])


def right_first(vectors: FloatArray, gallery: FloatArray, own: NDArray[np.int64], labels: NDArray[np.int64]) -> _Values:
    """(Q,): 1 where the first hit among the others is of the query's class."""
    first = top_k(vectors, gallery, 1, exclude=own[:, None])[1][:, 0]
    return np.asarray(labels[first] == labels[own], dtype=np.float64)


def change(before: _Values, after: _Values) -> dict[str, Any]:
    """Two measures of the same queries, side by side."""
    ((low, high),) = bootstrap_intervals((after - before)[:, None])
    return {"before": before.mean(), "after": after.mean(), "gain": [(after - before).mean(), low, high]}


def measure(
    model: MatViT, data: LabelledImages, *, pictures: int, queries: int, specs: Sequence[str]
) -> dict[str, Any]:
    """Adapt `model` on `pictures` of `data`, and measure `specs` on `queries` others."""
    rows = np.random.default_rng(0).permutation(len(data))[: pictures + queries]
    images, labels = [data.images[int(row)] for row in rows], data.labels[rows]
    gallery, own = embed(model, images, "XL"), np.arange(pictures, len(rows))
    before = {spec: embed(model, images[pictures:], spec) for spec in specs}
    began = time.process_time()
    kept = adapt(model, images[:pictures]).kept
    seconds = time.process_time() - began
    found: dict[str, Any] = {}
    for spec in specs:
        sides = (before[spec], embed(model, images[pictures:], spec))
        agreement = [compare(side, gallery, own).by_query for side in sides]
        recall = [right_first(side, gallery, own, labels) for side in sides]
        found[spec] = {"agreement@10": change(*agreement), "recall@1": change(*recall)}
    full = right_first(gallery[own], gallery, own, labels).mean()
    counts = {"pictures": pictures, "queries": len(own)}
    return counts | {"kept": kept, "cpu_seconds": seconds, "recall@1 of XL": full, "specs": found}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--classes")
    parser.add_argument("--encoder", default="matvit-small")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--specs", default="S,M,L")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = MatViT.from_pretrained(arguments.encoder)
    data = read_dataset(data_folder() / arguments.dataset, classes=arguments.classes)
    sizes = {"pictures": arguments.pictures, "queries": arguments.queries}
    result = measure(model, data, **sizes, specs=arguments.specs.split(","))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"kept: {', '.join(result['kept']) or 'none'}; {result['cpu_seconds']:.0f} s of one core;", end=" ")
    print(f"XL's recall@1 is {100 * result['recall@1 of XL']:.1f}")
    print("| query | agreement@10 | gain (95 %) | recall@1 | gain (95 %) |\n|---|---|---|---|---|")
    for spec, measures in result["specs"].items():
        cells = []
        for found in measures.values():
            gain, low, high = (100 * value for value in found["gain"])
            cells += [
                f"{100 * found['before']:.1f} → {100 * found['after']:.1f}",
                f"{gain:+.1f} ({low:+.1f} to {high:+.1f})",
            ]
        print(f"| {spec} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
