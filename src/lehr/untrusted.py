"""What comes from outside: files opened so that none can hang us, read within a bound; text made safe to show.

Every reader of a person's path opens it here. This file must not know what any file means.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 1 << 20


def open_file(path: str | Path) -> BinaryIO:
    """`path` opened for reading, links followed, if it is a plain file.

    A pipe would wait for ever for a writer, and a device such as /dev/zero never ends: both are refused.

    Raises:
        OSError: where it cannot be opened, or is something else; `strerror` says so in words.
    """
    try:
        _refuse_others(Path(path).stat().st_mode, path)
        # It may have become another thing since: opened without waiting, and looked at again.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # a NUL in it, or what is no text of the file system
        raise OSError(errno.EINVAL, "its name cannot be the name of a file", str(path)) from None
    try:
        _refuse_others(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, most: int) -> bytes:
    """The content of the plain file `path`, of at most `most` bytes.

    Raises:
        OSError: where it cannot be read, is no plain file, or is larger; `strerror` says so in words.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""  # in /proc, what has no size has content
    if size > most or len(content) > most:
        much = f"{most // MIB} MiB" if most >= MIB else f"{most} bytes"
        raise OSError(errno.EFBIG, f"it is larger than {much}, the most that such a file may have", str(path))
    return content


def printable(text: str) -> str:
    r"""`text` with everything escaped that a terminal might act on or that hides what is there: control
    characters, direction marks, lone surrogates; line ends too.

    >>> print(printable("new\nline \x1b[2J"))
    new\nline \x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    r"""`printable`, but for line ends: for a message of lehr's own, in which every name was made printable.

    >>> print(printable_lines("two\nlines \x1b[2J"))
    two
    lines \x1b[2J
    """
    return "\n".join(map(printable, text.split("\n")))


def brief(value: object, most: int = 200) -> str:
    """The `repr` of any value, cut to `most` characters: for messages about what a file holds.

    >>> brief("a" * 9, most=6)
    "'aaaa..."
    """
    try:
        said = repr(value)
    except (ValueError, RecursionError, MemoryError):  # an int of too many digits, a list of too many lists
        return f"a {type(value).__name__} too large to show"
    return said if len(said) <= most else f"{said[: most - 1]}..."


def _refuse_others(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no plain file, but a pipe, a socket or a device", str(path))
