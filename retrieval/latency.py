"""How long one picture takes a submodel on this machine: measured once a day, and kept in the cache folder.

A machine that was busy all the while is not found slow for ever. Delete the file to measure again at once.
"""

from __future__ import annotations

import io
import platform
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, PositiveFloat, TypeAdapter, ValidationError

from matvit.durable import cache_folder, write_atomic
from matvit.encoder import ElasticEncoder, ImageEncoder
from matvit.regular import read_small
from matvit.threads import computing_threads
from retrieval.files import sha256_bytes

_PICTURE = (640, 480)  # pixels
_ROUNDS = range(3, 26)  # the quickest counts: it is what the machine takes when no other program holds it
_SECONDS = 1.0  # after which the fewest rounds are enough: a search waits for this
_MEASURING = threading.Lock()  # what is measured beside another measurement takes longer, and is kept
_KEPT = 24 * 3600.0  # seconds


class _Time(BaseModel):
    ms: PositiveFloat
    measured: float  # seconds since 1970


_TIMES: TypeAdapter[dict[str, _Time]] = TypeAdapter(dict[str, _Time])


def latency_ms(
    encoder: ImageEncoder, *, elastic: ElasticEncoder, measuring: Callable[[str], None] = lambda _: None
) -> float:
    """Milliseconds of preprocessing and encoding one JPEG at best; `elastic` is what `encoder` was cut from.

    `measuring` is told the spec when its time is not known, which takes a second, on a busy machine some.
    """
    path, spec = _file(encoder, elastic), str(encoder.spec)
    with _MEASURING:
        known = _read(path)
        if spec not in known or not 0 <= time.time() - known[spec].measured < _KEPT:  # the clock may be set back
            measuring(spec)
            known[spec] = _Time(ms=_measured(encoder), measured=time.time())
            with suppress(OSError):  # or it is measured again next time
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, _TIMES.dump_json(known, indent=1))
    return known[spec].ms


def _file(encoder: ImageEncoder, elastic: ElasticEncoder) -> Path:
    """Other weights, runtimes, threads or processors take other times; a cache folder may be several machines'."""
    weights, processor = elastic.weights_sha256 or elastic.space_id, sha256_bytes(_processor().encode())
    return cache_folder() / f"latency-{weights:.16}-{encoder.runtime}-{computing_threads()}-{processor:.8}.json"


@cache
def _processor() -> str:
    with suppress(OSError, UnicodeDecodeError):  # Linux alone has the file
        if found := re.search(
            r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        ):
            return found[1]
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, _Time]:
    try:
        return dict(_TIMES.validate_json(read_small(path)))
    except (OSError, ValidationError):  # none yet, or damaged
        return {}


def _measured(encoder: ImageEncoder) -> float:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(_PICTURE).convert("RGB").save(buffer, "JPEG")
    times: list[float] = []  # seconds
    while len(times) < _ROUNDS.start or (len(times) + 1 in _ROUNDS and sum(times) < _SECONDS):
        start = time.perf_counter()
        encoder.embed([buffer.getvalue()])
        times.append(time.perf_counter() - start)
    return 1000 * min(times)
