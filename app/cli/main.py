"""The `matvit` command: wires the commands, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from matvit.errors import MatVitError, MissingExtraError, is_out_of_memory, on_a_line
from matvit_app.cli import (
    adapt,
    compact,
    convert,
    delete,
    demo,
    doctor,
    duplicates,
    evaluate,
    extract,
    index,
    info,
    repair,
    search,
    train,
    upgrade,
    verify,
)
from matvit_app.cli import app as app_command
from matvit_app.cli.output import say
from matvit_app.doctor import extra_of

BAD_NEWS, USAGE, INTERRUPTED = 1, 2, 130

# click's UsageError, wherever this version of typer keeps it
_UsageError: Any = typer.BadParameter.__mro__[1]

cli = typer.Typer(
    name="matvit",
    help="Adaptive image retrieval: one elastic encoder, one index, any query cost.",
    epilog="Start with: matvit demo",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """Refuses an empty argument: as a path it would silently mean the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        parameter: Any  # click's, wherever this version of typer keeps it
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name)
            if "" in (value if isinstance(value, list | tuple) else [value]):
                raise typer.BadParameter("it is empty", ctx=ctx, param=parameter)
        return super().parse_args(ctx, args)


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "demo": demo.demo,
    "index": index.index,
    "search": search.search,
    "delete": delete.delete,
    "info": info.info,
    "train": train.train,
    "extract": extract.extract,
    "eval": evaluate.evaluate,
    "convert": convert.convert,
    "adapt": adapt.adapt,
    "app": app_command.app,
    "doctor": doctor.doctor,
    "verify": verify.verify,
    "compact": compact.compact,
    "duplicates": duplicates.duplicates,
    "upgrade": upgrade.upgrade,
    "repair": repair.repair,
}


def _flowing(docstring: str) -> str:
    """Its paragraphs without their line breaks, which a terminal of another width would keep; "\\b" keeps its lines."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(
        one.removeprefix("\b\n") if one.startswith("\b") else one.replace("\n", " ") for one in paragraphs
    )


for _name, _command in _COMMANDS.items():
    cli.command(_name, cls=_Command, help=_flowing(_command.__doc__ or ""))(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"matvit-retrieval {version('matvit-retrieval')}")
        raise typer.Exit


@cli.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _settle_libraries() -> None:
    """Before they are loaded: what they say, and how their threads wait."""
    # What Pillow remarks on damaged files: one can draw thousands of lines; what is skipped is listed by us.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Each try of the hub's client to reach it, with its URL: what failed in the end is one sentence of ours.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Before torch is loaded: its threads wait awake 30 times as long, on cores that another program may want.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; gives its exit code: 0, 1 (bad news), 2 (usage or input error), 130 (Ctrl-C).

    What a user or a file supplied wrongly is one sentence on stderr, never a traceback.
    """
    _settle_libraries()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _warnings_as_sentences():
            code = cli(args=arguments or ["--help"], prog_name="matvit", standalone_mode=False)
        if sys.stdout is None:  # closed by whoever started us
            raise OSError(errno.EBADF, "standard output is closed")
        sys.stdout.flush()
        return code or 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough of it. Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_NEWS
    except _UsageError as error:
        say(f"error: {_usage_sentence(error)}")
    except ModuleNotFoundError as error:
        say(f"error: {_missing_module(error)}")
    except MatVitError as error:
        say(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        say(f"error: {on_a_line(_refusal(error))}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say("error: there is not enough memory; free some, and run the same again")
    return USAGE


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """What an index warns of is one sentence on stderr, without a line of our code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say_or_show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            from retrieval.errors import IndexWarning  # slow to import before something warns

            if issubclass(category, IndexWarning):
                say(f"warning: {message}")
            else:
                show(message, category, *rest, **named)

        warnings.showwarning = say_or_show
        yield


def _usage_sentence(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "matvit"
    message = error.format_message().rstrip(".")
    return f"{on_a_line(message)}; see: {command} --help"


def _refusal(error: OSError) -> str:
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}"
    if error.errno == errno.ENOENT:  # os.getcwd names no file
        return "the working folder is gone; change to one that is there"
    return error.strerror or str(error)


def _missing_module(error: ModuleNotFoundError) -> MissingExtraError:
    extra = extra_of(error.name or "")
    if extra is None:
        raise error
    return MissingExtraError.for_extra(extra, purpose=f"this command (package '{error.name}')")
