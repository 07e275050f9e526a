"""Pictures become pixels in processes of their own: for an encoder that computes elsewhere than on this host's cores.

A worker is sent files, or the names of files, which it reads itself: whatever this process does for a picture, it does
under one lock of Python's, for which all its threads wait.

A worker is this file's `serve` and what that imports: no torch, no index. It is started as a command of its own, not by
multiprocessing, which would import the user's script again, and copy its threads or need a guard there. It ends with
its standard input, and so with this process, however that ends; Ctrl-C at a terminal does not reach it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
from PIL import Image, ImageFile

from matvit.errors import ImageError, NotDecodedError
from matvit.preprocess import PixelArray, Preprocessing, read_header

Encoded = tuple[bytes, str]  # a picture's file, and its name for messages
Wanted = Callable[[int, "ReadFile"], bool]  # the place of a file among those that were named, and what was read
ANY_MEMORY = 2**63 - 1
_Answers = TypeVar("_Answers")

_CODE = "import sys, json; o = json.loads(sys.argv[1]); sys.path[:] = o.pop('path'); " + (
    "from matvit.decoding import serve; serve(**o)"
)
_LENGTH = struct.Struct("<Q")  # bytes of the message that follows
# Memory that each may take; 0, or the bytes of the largest file to be read; how many follow, all of their names and
# files after them (files to be read are empty).
_ASKED = struct.Struct("<QQI")
_READ = struct.Struct("<?Qq32s")  # whether the file was read, its bytes, time of change, sha256; then it is asked for
_NAMED = struct.Struct("<IQ")  # bytes of the name, of the file
_ANSWERED = struct.Struct("<BIII")  # one of the kinds below, width and height (0: unknown), bytes of pixels or reason
_PIXELS, _LARGER, _NO_PICTURE, _DAMAGED, _NOT_DECODED = range(5)
_STARTED = b"+"
_AGAIN = "index it again"
_PIPE_BYTES = 2**20  # where the system lets a pipe hold so much, an answer takes one or two calls
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy would start one for each core


class Decoded(NamedTuple):
    """What became of one picture."""

    width: int | None  # pixels as stored; None: its header does not tell
    height: int | None
    pixels: PixelArray | None  # (3, size, size); None: see `error`, and without one it takes more memory than allowed
    error: ImageError | None
    is_picture: bool = True  # whether its file begins like one


NOT_NOW = Decoded(None, None, None, None)


class ReadFile(NamedTuple):
    """A file that a worker has read."""

    size: int  # bytes
    mtime_ns: int
    sha256: str  # of its content, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One picture's file -> pixels, in this process."""

    preprocessing: Preprocessing
    size: int  # pixels a side

    def __call__(self, picture: Encoded, *, memory: int) -> Decoded:
        """`memory`: bytes; a picture that takes more, with its file, is not decoded."""
        data, name = picture
        try:
            header = read_header(io.BytesIO(data), path=name)
        except ImageError as error:
            return Decoded(None, None, None, error, is_picture=False)
        width, height, needed = header or (None, None, 0)
        if len(data) + needed > memory:
            return Decoded(width, height, None, None)
        try:
            return Decoded(width, height, self.preprocessing.pixels(data, size=self.size), None)
        except ImageError as error:
            return Decoded(width, height, None, error)
        except MemoryError:
            what = "there was not enough memory to decode it"
            return Decoded(width, height, None, NotDecodedError(what=what, where=name, fix=_AGAIN))


class Decoders:
    """A worker for each thread that asks, started when it first does. Safe from any thread."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._own = threading.local()
        self._workers: list[_Worker] = []  # all that are to be ended
        self._can_start = bool(sys.executable) and not getattr(sys, "frozen", False)  # a frozen program is no Python
        self._has_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._can_start = self._has_started = False  # a second Ctrl-C leaves threads at work
        workers = list(self._workers)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.end()

    def decode(self, pictures: Sequence[Encoded], *, memory: int) -> list[Decoded]:
        """Each of `pictures`, in order. `memory`: bytes that one may take; it is not decoded if it needs more.

        One that ends its worker has a NotDecodedError; those that were with it are decoded by another worker. Where
        none can be started, this thread decodes.
        """
        if self._can_start:
            try:
                return self._ask(lambda worker: worker.decode(pictures, memory=memory))
            except _NotStartedError:
                self._can_start = self._has_started
            except _EndedError as error:
                if len(pictures) > 1:
                    return [one for picture in pictures for one in self.decode([picture], memory=memory)]
                what = f"the process that decoded it ended ({error})"
                return [Decoded(None, None, None, NotDecodedError(what=what, where=pictures[0][1], fix=_AGAIN))]
        return [self._decoder(picture, memory=memory) for picture in pictures]

    def read(
        self, names: Sequence[str], *, largest: int, memory: int, wanted: Wanted
    ) -> list[tuple[ReadFile, Decoded] | None]:
        """Each of the files `names`, in order, as a worker reads it, and decodes it if it is then `wanted`.

        None for one that is not wanted, that cannot be read, is empty or has more than `largest` bytes, and for all of
        them where the worker ends or none can be started. `memory`: as for `decode`.
        """
        if self._can_start:
            try:
                return self._ask(lambda worker: worker.read(names, largest=largest, memory=memory, wanted=wanted))
            except _NotStartedError:
                self._can_start = self._has_started
            except _EndedError:
                pass  # by one of them
        return [None for _ in names]

    def _ask(self, question: Callable[[_Worker], _Answers]) -> _Answers:
        """Of this thread's worker. Raises _NotStartedError or _EndedError."""
        worker = self._worker()
        try:
            answers = question(worker)
        except (OSError, EOFError) as error:
            how = self._end(worker)
            raise (_EndedError(how) if worker.started else _NotStartedError) from error
        except BaseException:  # part of an answer may still come
            self._end(worker)
            raise
        self._has_started = True
        return answers

    def _worker(self) -> _Worker:
        if (worker := getattr(self._own, "worker", None)) is None:
            try:
                worker = _Worker(self._decoder)
            except OSError as error:
                raise _NotStartedError from error
            self._own.worker = worker
            self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> str:
        self._own.worker = None
        self._workers.remove(worker)
        worker.kill()
        return worker.end()


class _NotStartedError(Exception):
    pass


class _EndedError(Exception):
    """How, in a few words."""


class _Worker:
    """A process, for one thread at a time."""

    def __init__(self, decoder: Decoder) -> None:
        options = {
            # "" is the current folder, not to be looked into first; this package may have been found by it.
            "path": [*filter(None, sys.path), str(Path(__file__).parents[1])],
            "preprocessing": asdict(decoder.preprocessing),
            "size": decoder.size,
            "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
            "warned_pixels": Image.MAX_IMAGE_PIXELS,
        }
        self.started = False
        self._process = subprocess.Popen(  # noqa: S603 (our own arguments)
            # -P: a json.py of the current folder is not ours. -S: the path is given, and `site` takes long to find it.
            [sys.executable, "-P", "-S", "-c", _CODE, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what Pillow remarks on damaged files
            bufsize=0,
            env=os.environ | _ONE_THREAD,
            start_new_session=True,
        )
        assert isinstance(self._process.stdin, io.FileIO)
        assert isinstance(self._process.stdout, io.FileIO)
        self._asked, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._asked, self._answers):
            _widen(pipe.fileno())

    def decode(self, pictures: Sequence[Encoded], *, memory: int) -> list[Decoded]:
        """Raises OSError or EOFError when the process has ended."""
        self._send([(_text(name), data) for data, name in pictures], memory=memory)
        return _unpacked(_receive(self._answers), [name for _, name in pictures])

    def read(
        self, names: Sequence[str], *, largest: int, memory: int, wanted: Wanted
    ) -> list[tuple[ReadFile, Decoded] | None]:
        """As `Decoders.read`. Raises OSError or EOFError when the process has ended."""
        self._send([(_text(name), b"") for name in names], memory=memory, largest=largest)
        was_read = list(_READ.iter_unpack(_receive(self._answers)))
        found = [ReadFile(size, time, sha256.hex()) if good else None for good, size, time, sha256 in was_read]
        asked = [file if file is not None and wanted(number, file) else None for number, file in enumerate(found)]
        _send(self._asked, [bytes(file is not None for file in asked)])
        named = [name for name, file in zip(names, asked, strict=True) if file is not None]
        decoded = iter(_unpacked(_receive(self._answers), named))
        return [None if file is None else (file, next(decoded)) for file in asked]

    def _send(self, named: Sequence[tuple[bytes, bytes]], *, memory: int, largest: int = 0) -> None:
        if not self.started:
            self.started = _read(self._answers, len(_STARTED)) == _STARTED
        parts = [_ASKED.pack(memory, largest, len(named)), *(_NAMED.pack(*map(len, one)) for one in named)]
        _send(self._asked, parts + [part for one in named for part in one])

    def kill(self) -> None:
        """It has nothing to lose."""
        self._process.kill()

    def end(self) -> str:
        """Wait for it; how it ended, in a few words."""
        code = self._process.wait()
        self._asked.close()
        self._answers.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _unpacked(answer: memoryview, names: Sequence[str]) -> list[Decoded]:
    place, found = len(names) * _ANSWERED.size, []
    for number, name in enumerate(names):
        kind, width, height, length = _ANSWERED.unpack_from(answer, number * _ANSWERED.size)
        start, place = place, place + length
        pixels, error = None, None
        if kind == _PIXELS:
            side = round((length / 3) ** 0.5)
            pixels = np.frombuffer(answer, np.uint8, length, start).reshape(3, side, side)
        elif kind != _LARGER:
            what = str(answer[start:place], "utf-8", "surrogatepass")
            error = (NotDecodedError if kind == _NOT_DECODED else ImageError)(what=what, where=name, fix="")
        found.append(Decoded(width or None, height or None, pixels, error, is_picture=kind != _NO_PICTURE))
    return found


# --- in the worker -------------------------------------------------------------------------------


def serve(*, preprocessing: dict[str, object], size: int, truncated: bool, warned_pixels: int | None) -> None:
    """Answer on standard output what is asked on standard input, until that ends."""
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = truncated, warned_pixels
    decoder = Decoder(preprocessing=Preprocessing(**preprocessing), size=size)  # type: ignore[arg-type]
    with open(os.dup(0), "rb", buffering=0) as asked, open(os.dup(1), "wb", buffering=0) as answers:  # noqa: PTH123
        os.dup2(2, 1)  # whatever else prints, it is no answer
        answers.write(_STARTED)
        while True:
            try:
                message = _receive(asked)
            except EOFError:
                return
            memory, largest, count = _ASKED.unpack_from(message)
            pictures = _pictures(message, count)
            del message
            if largest:
                files = [_file(name, largest) for _, name in pictures]
                _send(answers, [head for head, _ in files])
                wanted = _receive(asked)
                pictures = [(files[number][1], pictures[number][1]) for number in range(count) if wanted[number]]
                del files
            heads, contents = [], []
            for picture in pictures:
                kind, found, content = _answer(decoder, picture, memory)
                heads.append(_ANSWERED.pack(kind, found.width or 0, found.height or 0, len(content)))
                contents.append(content)
            del pictures
            _send(answers, [*heads, *contents])


def _pictures(message: memoryview, count: int) -> list[Encoded]:
    ends, found = _ASKED.size + count * _NAMED.size, []
    for number in range(count):
        name, data = _NAMED.unpack_from(message, _ASKED.size + number * _NAMED.size)
        start, ends = ends, ends + name + data
        found.append(
            (bytes(message[start + name : ends]), str(message[start : start + name], "utf-8", "surrogatepass"))
        )
    return found


def _file(name: str, largest: int) -> tuple[bytes, bytes]:
    """What is to be said of a file, and its content."""
    try:
        with open(name, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            small = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= largest
            data = file.read(status.st_size + 1) if small else b""
        if data and len(data) == status.st_size:  # a disk of the network may give less at once
            head = _READ.pack(True, status.st_size, status.st_mtime_ns, hashlib.sha256(data).digest())
            return head, data
    except (OSError, ValueError, struct.error, MemoryError):  # the other process says why, or does it in another way
        pass
    return _READ.pack(False, 0, 0, b""), b""


def _open_at_once(name: str, flags: int) -> int:
    """A pipe would wait for who writes to it."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _answer(decoder: Decoder, picture: Encoded, memory: int) -> tuple[int, Decoded, bytes]:
    found = decoder(picture, memory=memory)
    if found.pixels is not None:
        return _PIXELS, found, found.pixels.tobytes()
    if found.error is None:
        return _LARGER, found, b""
    kind = _DAMAGED if found.is_picture else _NO_PICTURE
    kind = _NOT_DECODED if isinstance(found.error, NotDecodedError) else kind
    return kind, found, found.error.what.encode("utf-8", "surrogatepass")


# --- messages ------------------------------------------------------------------------------------


def _text(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _send(pipe: io.FileIO, parts: Sequence[bytes]) -> None:
    left = memoryview(b"".join([_LENGTH.pack(sum(map(len, parts))), *parts]))
    while left:
        left = left[pipe.write(left) :]


def _receive(pipe: io.FileIO) -> memoryview:
    [length] = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    return _read(pipe, length)


def _read(pipe: io.FileIO, length: int) -> memoryview:
    """Raises EOFError when there are fewer bytes."""
    found = np.empty(length, np.uint8).data  # unlike a bytearray not filled with zeros, under Python's lock
    left = found
    while left:
        read = pipe.readinto(left)
        if not read:
            raise EOFError
        left = left[read:]
    return found


def _widen(pipe: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):  # another system, or the user's pipes are as large as all may be
        return
