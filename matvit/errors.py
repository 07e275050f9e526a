"""The error tree: every error a person can cause says what is wrong, where, and how to mend it.

MatVitError
├── SpecError               a submodel spec that names no submodel of this encoder
├── BackboneError           a timm model that cannot be made elastic
├── CheckpointError         a checkpoint folder that is missing, damaged or too new
├── ImageError              one picture that cannot be read
│   └── NotDecodedError     ... for a reason that is not in it, such as memory: it may be read another time
├── DatasetError            a folder or parquet file that holds no labelled pictures
├── RecipeError             a training recipe that cannot be carried out
└── MissingExtraError       an optional dependency that is not installed

`retrieval.errors` adds the index's branch.
"""

from __future__ import annotations

_CONTROLS = {code: " " if chr(code) in "\t\n\r" else "?" for code in (*range(32), *range(127, 160))}


class MatVitError(Exception):
    """Base of every error that is raised for what a user or a file supplied.

    `str(error)` is one sentence: where, what, and what to do about it.
    """

    def __init__(self, *, what: str, where: str, fix: str) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        return f"{on_a_line(self.where)}: {on_a_line(self.what)}; {on_a_line(self.fix)}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def on_a_line(text: str) -> str:
    """`text` without control characters, and where it is very long, as what it quotes can be, without its middle."""
    text = text.translate(_CONTROLS)
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-150:]}"


def first_line(error: Exception) -> str:
    """Why something foreign failed, in one line: its message's first, or the error's name where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was asked for in vain, on a device or on the host."""
    # torch's errors by what they are called: not everyone has it. On the host it has no error of its own for this.
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


def _rebuild(kind: type[MatVitError], what: str, where: str, fix: str) -> MatVitError:
    return kind(what=what, where=where, fix=fix)


class SpecError(MatVitError, ValueError):
    """A submodel spec that is malformed or names no submodel of this encoder."""


class BackboneError(MatVitError):
    """A timm model whose architecture cannot be made elastic."""


class CheckpointError(MatVitError):
    """A checkpoint folder that is missing, damaged, or of a newer format."""


class ImageError(MatVitError):
    """One picture that cannot be read; `what` is the short reason that reports list."""


class NotDecodedError(ImageError):
    """One picture that could not be decoded here and now: no file, no memory, or no decoder for its format."""


class DatasetError(MatVitError):
    """A data set that is missing, empty, or not in a layout that is read."""


class RecipeError(MatVitError):
    """A training recipe that is malformed or cannot be carried out."""


class MissingExtraError(MatVitError, ImportError):
    """An optional dependency is not installed; `fix` is the exact install line."""

    @classmethod
    def for_extra(cls, extra: str, *, purpose: str) -> MissingExtraError:
        """The error that names the install line for `extra`, needed for `purpose`."""
        return cls(
            what=f"{purpose} needs packages that are not installed",
            where=f"extra '{extra}'",
            fix=f'run: pip install "matvit-retrieval[{extra}]"',
        )
