"""What holds for all tests: no test is timed, and those of several processes share the cores."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded: tests compute tiny things, and more threads than cores only wait for each other, awake.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a machine may be slow, or busy
settings.load_profile("untimed")
