"""How often a long run publishes what is complete: soon at first, so that a kill of a short run loses little, too."""

from __future__ import annotations

import time

FIRST_SECONDS = 5.0  # a kill loses at most so much time ...
SHARE = 0.25  # ... or so much of the run's so far, whichever is more ...
MOST_SECONDS = 60.0  # ... and never more than this


class Pace:
    """Of one run, from now on. Each publication is one more segment, so the later ones are farther apart."""

    def __init__(self, *, most: int) -> None:
        """`most`: entries that wait for their publication at one time."""
        self._most = most
        self._started = self._published = time.monotonic()

    def is_due(self, waiting: int) -> bool:
        """Whether `waiting` entries are to be published."""
        seconds = max(FIRST_SECONDS, SHARE * (self._published - self._started))
        return waiting >= self._most or time.monotonic() - self._published > min(seconds, MOST_SECONDS)

    def published(self) -> None:
        """Call it after each publication."""
        self._published = time.monotonic()
