"""A progress bar on stderr, fed by `ProgressEvent`s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from matvit.progress import Progress, ProgressEvent, silent


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback that draws one bar per stage while the block runs; nothing where stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
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
