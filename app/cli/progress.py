"""A progress bar on stderr, or plain lines where that is no terminal, fed by `ProgressEvent`s."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from matvit.progress import Progress, ProgressEvent
from matvit_app.cli.output import say

_SOON, _QUIET = 5.0, 30.0  # seconds between the first two lines of one stage, and later ones


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback that draws one bar per stage while the block runs; plain lines where stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines()
        yield lines
        lines.close()
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.completed:.0f} {task.fields[of_total]}{task.fields[unit]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}", markup=False),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def show(event: ProgressEvent) -> None:
            of_total = "" if event.total is None else f"of {event.total} "
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total, of_total="", unit="", note="")
            bar.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total,
                of_total=of_total,
                unit=event.unit,
                note=event.note,
            )

        yield show


class Lines:
    """A callback for log files: a line when a stage begins, one when it ends, and some between.

    Those come 5, 10, 20 and 40 s after the first, then every 30 s. They tell how long it will take at the pace since
    the line before, as soon as a tenth or 16 are done: what comes first, such as loading weights, is no pace.
    """

    def __init__(self) -> None:
        self._last: dict[str, ProgressEvent] = {}
        self._began: dict[str, float] = {}
        self._told: dict[str, tuple[int, float]] = {}  # of a stage: what was done at its last line, and when

    def __call__(self, event: ProgressEvent) -> None:
        """Prints the event if it is time to."""
        self._last[event.stage] = event
        done, when = self._told.get(event.stage, (event.done + 1, 0.0))
        if event.done < done:  # it begins, or begins again
            self._began[event.stage] = time.monotonic()
            self._tell(event)
            return
        quiet = min(max(_SOON, when - self._began[event.stage]), _QUIET)
        if time.monotonic() - when >= quiet or done < event.done == event.total:
            self._tell(event)

    def close(self) -> None:
        """Prints where stages of an unknown length ended."""
        for event in self._last.values():
            if self._told[event.stage][0] != event.done:
                self._tell(event)

    def _tell(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        done, when = self._told.get(event.stage, (event.done, now))
        self._told[event.stage] = event.done, now
        notes = [event.note] if event.note else []
        if event.total is not None and done < event.done < event.total and event.done >= min(16, event.total / 10):
            left = (event.total - event.done) * (now - when) / (event.done - done)
            notes.append(f"{timedelta(seconds=round(left))} left")
        of_total = "" if event.total is None else f" of {event.total}"
        say(", ".join([f"{event.stage}: {event.done}{of_total} {event.unit}", *notes]))
