"""Index a folder of pictures once, and query it at four costs.

python examples/quick_start.py PHOTOS PICTURE [CHECKPOINT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from matvit import MatViT
from retrieval import Index, Retriever


def main(photos: str, picture: str, checkpoint: str = "matvit-small") -> None:
    """Prints, for each size of the query encoder, its share of the FLOPs, the time, and the best hit."""
    encoder = MatViT.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photos.index"
        index = Index.build(photos, encoder=encoder, path=path)
        print(f"{index.info().items} pictures indexed by the full encoder")

        retriever = Retriever.open(path, encoder=encoder)
        for spec in ("S", "M", "L", "XL"):
            retriever.search(picture, encoder=spec)  # the first query extracts the submodel
            hits = retriever.search(picture, encoder=spec, k=5)
            share = encoder.flops(spec) / encoder.flops()
            print(
                f"{spec:>2}: {share:4.0%} of the FLOPs, {hits.latency_ms.total:5.1f} ms, "
                f"best hit {hits[0].path.name} ({hits[0].score:.3f})"
            )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
