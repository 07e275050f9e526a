"""How long one picture takes a submodel on this machine: measured once, and kept in the cache folder.

Delete the file to measure again.
"""

from __future__ import annotations

import io
import os
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image
from pydantic import PositiveFloat, TypeAdapter, ValidationError

from matvit.durable import cache_folder, write_atomic
from matvit.encoder import ElasticEncoder, ImageEncoder

_PICTURE = (640, 480)  # pixels
_ROUNDS = 25  # the quickest counts: it is what the machine takes when no other program holds it
_TIMES: TypeAdapter[dict[str, PositiveFloat]] = TypeAdapter(dict[str, PositiveFloat])


def latency_ms(encoder: ImageEncoder, *, elastic: ElasticEncoder) -> float:
    """Milliseconds of preprocessing and encoding one JPEG at best; `elastic` is what `encoder` was cut from."""
    path, spec = _file(encoder, elastic), str(encoder.spec)
    known = _read(path)
    if spec not in known:
        known[spec] = _measured(encoder)
        with suppress(OSError):  # or it is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _TIMES.dump_json(known, indent=1))
    return known[spec]


def _file(encoder: ImageEncoder, elastic: ElasticEncoder) -> Path:
    """Other weights, runtimes or threads take other times."""
    weights, threads = elastic.weights_sha256 or elastic.space_id, os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return cache_folder() / f"latency-{weights:.16}-{encoder.runtime}-{threads}.json"


def _read(path: Path) -> dict[str, float]:
    try:
        return dict(_TIMES.validate_json(path.read_bytes()))
    except (OSError, ValidationError):  # none yet, or damaged
        return {}


def _measured(encoder: ImageEncoder) -> float:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(_PICTURE).convert("RGB").save(buffer, "JPEG")
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        encoder.embed([buffer.getvalue()])
        times.append(1000 * (time.perf_counter() - start))
    return min(times)
