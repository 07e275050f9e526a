"""`matvit doctor`: what this installation can do, and what it lacks."""

from __future__ import annotations

import typer

from matvit_app.cli.output import JsonFlag, write_json, write_line, write_table
from matvit_app.doctor import DoctorReport, run_doctor


def doctor(*, json: JsonFlag = False) -> None:
    """Check this installation, and say how to mend it.

    Shown are versions, devices, threads, runtimes, the bundled checkpoint, and the packages that are missing.

    Exit code 1 when something is broken. A missing extra is not: its install line is shown.

    \b
    Example:
      matvit doctor
    """
    report = run_doctor()
    if json:
        write_json(report.to_json())
    else:
        _show(report)
    if report.problems:
        raise typer.Exit(code=1)


def _show(report: DoctorReport) -> None:
    rows = [["python", f"{report.python}, {report.platform}"]]
    rows += [[name, number] for name, number in report.versions.items()]
    rows += [["devices", ", ".join(report.devices)]]
    rows += [["threads", ", ".join(f"{name} {count}" for name, count in report.threads.items())]]
    rows += [["runtimes", ", ".join(report.runtimes) or "none"]]
    rows += [[f"checkpoint {state.name}", state.problem or "whole"] for state in report.checkpoints]
    for extra in report.extras:
        state = f"lacks {', '.join(extra.missing)}; {extra.install}" if extra.missing else "installed"
        rows.append([f"extra {extra.name}", state])
    write_table(["", ""], rows, text_columns=2)
    for problem in report.problems:
        write_line(f"broken: {problem}")
    if not report.problems:
        write_line("Everything needed is there.")
