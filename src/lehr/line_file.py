"""A file that lines are added to, on a disk that may be full, go away and come back.

Adding a line never fails because of the disk: a line that cannot be written waits in memory, with all that
follow, and is tried again with the next one. Each line is written whole or not at all. This file must not
know what the lines say.
"""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from contextlib import suppress
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Final

_LOOK_EVERY: Final = 1.0
"""Seconds between two looks whether the path still leads to the file that is open."""


class LineFile:
    """Adds lines to the file at `path`, each at once and in one piece. It is for one thread.

    How many lines may wait is not limited. Where the file at `path` is no longer the one that was opened, it
    is taken up again once it is back or found to be a copy, and made anew where it was deleted, out of the
    file that is still open. Its folder is never made.

    Args:
        path: the file; it is made where it is missing.
        data: what it holds already, whole lines.

    Raises:
        OSError: where the file cannot be opened.
    """

    def __init__(self, path: Path, data: bytes = b"") -> None:
        self._name = path
        self._path = path.absolute()  # the program may change its working directory
        self._waiting: deque[bytes] = deque()
        self._problem = ""
        self._looked = -math.inf
        self._file = _open(self._path)
        self._opened = os.fstat(self._file.fileno())
        self._end = len(data)  # where the last whole line ends; what may stand behind it is half a line
        self._hash = blake2b(data)  # of everything up to there

    @property
    def waiting(self) -> int:
        """How many lines could not be written yet."""
        return len(self._waiting)

    @property
    def problem(self) -> str:
        """What is wrong with the file, in words; "" when all is well."""
        return self._problem

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def add(self, line: bytes, now: float) -> None:
        """Add `line`, which ends with a line feed, at `now`, in seconds from any start; it may go backwards."""
        self._waiting.append(line)
        due = not 0 <= now - self._looked < _LOOK_EVERY
        if due:
            self._looked = now
        self._flush(look=due or bool(self._problem))

    def flush(self) -> None:
        """Write what waits, as far as it can be written; after `close` it does nothing."""
        if not self._file.closed:
            self._flush(look=True)

    def _flush(self, *, look: bool) -> None:
        trouble = ""
        try:
            if look:
                trouble = self._look()
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            trouble = f"the lines cannot be written ({_why(error)}); {len(self._waiting)} wait"
        self._problem = trouble and f"{self._name}: {trouble}"

    def sync(self) -> None:
        """`flush`, and return when the device itself has the lines: a power cut loses none of them then."""
        self.flush()
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says that this is no file of a disk
                self._problem = f"{self._name}: the device did not confirm the lines ({_why(error)})"

    def close(self) -> None:
        """Try once more to write what waits, and close the file; calling it again does nothing."""
        if self._file.closed:
            return
        self.flush()
        number, held = self._file.fileno(), self._held()
        self._file.close()
        try:
            if held:
                os.close(number)
        except OSError as error:  # a disk of the network may say only now that it is full
            self._problem = f"{self._name}: the file could not be closed ({_why(error)})"

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):  # a full disk may take a part of a line before it refuses
                written += self._file.write(line[written:])
        except BaseException:
            with suppress(OSError):
                self._cut()
            raise
        self._end += len(line)
        self._hash.update(line)

    def _cut(self) -> None:
        """Take half a line off the end."""
        if os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)

    def _look(self) -> str:
        """See that lines go where they will be looked for; put right what can be.

        Returns:
            What is wrong though lines can be written, or "".

        Raises:
            OSError: where they cannot.
        """
        if self._is_at_path():
            if self._problem:
                self._cut()
            return ""
        try:
            self._return_to_path()
        except OSError as error:
            held = self._held()
            if held is None or held.st_nlink == 0:
                raise
            return (
                f"this is no longer the file that was opened ({_why(error)}); "
                "the lines go on into that one, wherever it is now"
            )
        return ""

    def _held(self) -> os.stat_result | None:
        """The file that is open, or None where the system has lost it: a disk that was pulled, say."""
        try:
            held = os.fstat(self._file.fileno())
        except OSError:
            return None
        return held if os.path.samestat(held, self._opened) else None

    def _is_at_path(self) -> bool:
        held = self._held()
        try:
            here = self._path.stat()
        except OSError:
            return False
        return held is not None and os.path.samestat(here, held) and here.st_size >= self._end

    def _return_to_path(self) -> None:
        """Go on with the file at the path, where it has our lines or can be given them.

        It has them when a disk is back, or after an editor has saved it; it is given them where it was deleted.
        """
        held = self._held()
        if held is None and not self._path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        file = _open(self._path)
        try:
            file.seek(0)
            there = file.read()
            if self._is_ours(there):
                file.truncate(self._end)
            else:
                rest = self._after(there) if held else None
                if rest is None:
                    raise FileExistsError(errno.EEXIST, "what lies there is not what was written")
                while rest:
                    rest = rest[file.write(rest) :]
        except BaseException:
            os.close(file.fileno())
            raise
        last, self._file, self._opened = self._file.fileno(), file, os.fstat(file.fileno())
        if held:  # where the system has lost it, its number may be another file's by now
            with suppress(OSError):
                os.close(last)

    def _is_ours(self, there: bytes) -> bool:
        """Whether a file's content is all that was written, and at most half a line more."""
        same = blake2b(there[: self._end]).digest() == self._hash.digest()
        return same and b"\n" not in there[self._end :]

    def _after(self, there: bytes) -> bytes | None:
        """What was written after `there`, from the file that is open; None where it did not begin so."""
        self._file.seek(0)
        if self._file.read(len(there)) != there:
            return None
        rest = self._file.read(self._end - len(there))
        return rest if len(there) + len(rest) == self._end else None


def _open(path: Path) -> FileIO:
    """The file at `path`, to read and to add to. Its number is for `os.close`: closing the object leaves it open.

    It has no buffer, so that one write() is one line: nothing waits where we cannot see it, and no line is
    written in two halves.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    return FileIO(os.open(path, flags, 0o666), "ab+", closefd=False)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
