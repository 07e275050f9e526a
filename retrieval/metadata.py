"""What a user says of pictures, as a JSON object that an item can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

MAX_METADATA = 64 * 1024  # bytes of one picture's metadata


def to_json(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The metadata as JSON (None when there is none), and what is wrong with it (None: nothing).

    Missing values (null, NaN) and bytes are left out; times become ISO text.
    """
    kept = {str(name): _plain(value) for name, value in values.items()}
    text = json.dumps({name: value for name, value in kept.items() if value is not None}, sort_keys=True)
    if len(text) > MAX_METADATA:
        return None, f"its metadata has more than {MAX_METADATA // 1024} KiB"
    return (text, None) if text != "{}" else (None, None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) else None
