"""What a log file gets to see of a long command."""

from __future__ import annotations

from datetime import timedelta

from matvit.progress import ProgressEvent
from matvit_app.cli import progress


def test_without_a_terminal_the_begin_and_the_end_of_a_stage_are_a_line_each(run, photos, checkpoint, tmp_path):
    done = run("index", photos, "--index", tmp_path / "a.index", "--encoder", checkpoint, "--json")
    assert done.progress[0].startswith("index: 0 of 8 pictures")
    assert done.progress[-1].startswith("index: 8 of 8 pictures")
    assert done.json  # nothing else on stdout


def test_between_them_lines_are_printed_after_5_s_and_ever_later_up_to_30_s(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar() as show:
        for done in range(91):  # a second each
            show(ProgressEvent(stage="a", done=done, total=90, unit="steps"))
            show(ProgressEvent(stage="b", done=done, total=None, unit="rows"))
            now[0] += 1
        show(ProgressEvent(stage="a", done=90, total=90, unit="steps"))
    lines = capfd.readouterr().err.splitlines()
    told = (0, 5, 10, 20, 40, 70, 90)
    left = {done: f", {timedelta(seconds=90 - done)} left" for done in told[2:-1]}  # a tenth is done
    assert [line for line in lines if line[0] == "a"] == [f"a: {done} of 90 steps{left.get(done, '')}" for done in told]
    assert [line for line in lines if line[0] == "b"] == [f"b: {done} rows" for done in told]
